"""Memory and operations of a computation on the meta device: what would be allocated, at what time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten


class Live(TorchDispatchMode):
    """Counts bytes of tensors that operations make, from when they are made to when nothing refers to them.

    now, peak: bytes; flops: operations of matrix products, convolutions and attention; attention_rounds: how
    many times the keys that attention is given stand for.
    """

    def __init__(self, attention_rounds: int = 1) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._rounds = attention_rounds
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        self._count(func, args, kwargs or {}, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _key(tensor) not in given | self._known:
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        self._known.add(key)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.now -= size
        self._known.discard(key)

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = func._overloadpacket
        if packet in _ATTENTION:
            self.flops += self._rounds * _ATTENTION[packet](*args)
        elif packet in flop_registry:
            self.flops += int(flop_registry[packet](*args, **kwargs, out_val=out))


def _attention(q: Tensor, k: Tensor, *_rest: Any) -> int:
    return 4 * q.numel() * k.shape[2]


def _attention_backward(_grad: Tensor, q: Tensor, k: Tensor, *_rest: Any) -> int:
    return 10 * q.numel() * k.shape[2]


_ATTENTION: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def attend(q: Tensor, k: Tensor, v: Tensor, _mask: Tensor | None = None) -> Tensor:
    """Stand for a fused attention kernel: it keeps q, k, v, its output and the log-sum-exps."""
    out: Tensor = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    return out


@contextmanager
def dropped_gradients(module: torch.nn.Module) -> Iterator[None]:
    """Within, gradients of parameters are gone as soon as they are made: they are counted elsewhere."""

    def drop(param: Tensor) -> None:
        param.grad = None

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in module.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
