"""Every collective and every send that a piece of code issues, with its bytes and its ranks.

They are noted where torch dispatches them: below FSDP, DTensor, functional collectives and our own calls, in
forward and in backward passes. What one operation issues inside is not noted a second time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Sent(NamedTuple):
    """One collective or send. size: bytes of what is gathered, reduced or broadcast as a whole; of an
    all-to-all or a send, bytes that this rank hands to others. ranks: those of the group.
    """

    kind: str
    size: int
    ranks: tuple[int, ...]


@contextmanager
def counted() -> Iterator[list[Sent]]:
    """Note what this process issues within."""
    with _Noting() as noting:
        yield noting.sent


def totals(sent: Iterable[Sent]) -> dict[tuple[str, tuple[int, ...]], int]:
    """Return {(kind, ranks): bytes}, without what has none."""
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for item in sent:
        found[item.kind, item.ranks] += item.size
    return {key: size for key, size in found.items() if size}


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, dist.tensor.DTensor) for kind in types):
            return NotImplemented  # it says first what it does to its parts
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        named |= kwargs or {}
        if func.namespace == "c10d":
            self._note(_C10D, func, named, _ranks_of(named.get("process_group")))
        elif func.namespace == "_c10d_functional":
            self._note(_FUNCTIONAL, func, named, _ranks_of(named.get("group_name")))
        if func.namespace == "cvx":
            with self:  # its kernel, for what our own operations are made of
                return func.redispatch(DispatchKeySet(DispatchKey.CPU), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _note(self, known: Mapping[str, Any], func: Any, named: Any, ranks: tuple[int, ...]) -> None:
        """Raise KeyError for an operation that is not known, which would go uncounted."""
        kind, size = known[func._schema.name.split("::")[1]]
        if kind:
            self.sent.append(Sent(kind, size(named, ranks), ranks))


def _ranks_of(group: Any) -> tuple[int, ...]:
    if group is None:
        return ()
    if isinstance(group, str):
        group = dist.distributed_c10d._resolve_process_group(group)
    elif not isinstance(group, dist.ProcessGroup):
        group = dist.ProcessGroup.unbox(group)
    return tuple(dist.get_process_group_ranks(group))


Size = Callable[[Mapping[str, Any], Sequence[int]], int]


def _bytes(value: Any) -> int:
    return sum(tensor.nbytes for tensor in tree_leaves(value) if isinstance(tensor, Tensor))


def _of(*names: str) -> Size:
    return lambda named, _: sum(_bytes(named[name]) for name in names)


def _times(name: str) -> Size:
    """Return the size of a collective that is only told a rank's part."""
    return lambda named, ranks: _bytes(named[name]) * len(ranks)


def _handed(named: Mapping[str, Any], ranks: Sequence[int]) -> int:
    """Return the bytes of an all-to-all that leave this rank."""
    own, x = ranks.index(dist.get_rank()), named["input"]
    splits = named["input_split_sizes"]
    if not splits:
        return int(x.nbytes * (len(ranks) - 1) // len(ranks))
    return int(x.nbytes - splits[own] * x[:1].nbytes)


def _listed(named: Mapping[str, Any], ranks: Sequence[int]) -> int:
    own = ranks.index(dist.get_rank())
    return sum(x.nbytes for rank, x in enumerate(named["input_tensors"]) if rank != own)


def _nothing(_named: Mapping[str, Any], _ranks: Sequence[int]) -> int:
    return 0


_SILENT = ("", _nothing)
_C10D: Mapping[str, tuple[str, Size]] = {
    "allreduce_": ("all_reduce", _of("tensors")),
    "allreduce_coalesced_": ("all_reduce", _of("tensors")),
    "_allgather_base_": ("all_gather", _of("output_tensor")),
    "allgather_": ("all_gather", _of("output_tensors")),
    "allgather_into_tensor_coalesced_": ("all_gather", _of("outputs")),
    "_reduce_scatter_base_": ("reduce_scatter", _of("input_tensor")),
    "reduce_scatter_": ("reduce_scatter", _of("input_tensors")),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", _of("inputs")),
    "broadcast_": ("broadcast", _of("tensors")),
    "alltoall_base_": ("all_to_all", _handed),
    "alltoall_": ("all_to_all", _listed),
    "send": ("send", _of("tensors")),
    "barrier": ("barrier", _nothing),
    "recv_": _SILENT,
}
_FUNCTIONAL: Mapping[str, tuple[str, Size]] = {
    "all_reduce": ("all_reduce", _of("input")),
    "all_reduce_": ("all_reduce", _of("input")),
    "all_reduce_coalesced": ("all_reduce", _of("inputs")),
    "all_gather_into_tensor": ("all_gather", _times("input")),
    "all_gather_into_tensor_coalesced": ("all_gather", _times("inputs")),
    "all_gather_into_tensor_out": ("all_gather", _times("input")),
    "reduce_scatter_tensor": ("reduce_scatter", _of("input")),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", _of("inputs")),
    "reduce_scatter_tensor_out": ("reduce_scatter", _of("input")),
    "broadcast": ("broadcast", _of("input")),
    "broadcast_": ("broadcast", _of("input")),
    "all_to_all_single": ("all_to_all", _handed),
    "wait_tensor": _SILENT,
    "_wrap_tensor_autograd": _SILENT,
}
