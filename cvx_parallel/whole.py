"""Parameters that are spread over ranks, whole on the first one, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cvx_core.errors import SaidError
from cvx_core.interfaces import TensorInfo, Tensors
from cvx_core.mesh import AXES, Mesh

Write = Callable[[Mapping[str, Tensors]], None]
"""Takes {key: the parameters of that module}, and may read them in any order."""

_END, _FAILED = ("", "end"), ("", "failed")


def write_whole(modules: Mapping[str, nn.Module], mesh: Mesh, write: Write) -> None:
    """Call `write` on the first rank with all parameters of modules; the other ranks hand over their parts.

    Collective over all ranks. Of each tensor that `write` reads there is one whole copy at a time, on the CPU
    of the first rank (and on the ranks that gather it). Raises on the other ranks where `write` fails.
    """
    held = {(key, name): p for key, module in modules.items() for name, p in module.named_parameters()}
    if mesh.degrees.world == 1:
        write(_by_key({at: _info(p) for at, p in held.items()}, modules, lambda at: held[at].detach().cpu()))
        return
    source = _Source(held, mesh)
    if not mesh.is_first:
        source.serve()
        return
    try:
        write(_by_key(source.index, modules, source.ask))
    except BaseException:
        source.tell(_FAILED)
        raise
    source.tell(_END)


Place = tuple[str, str]


class _Source:
    """Tensors that the first rank asks for by name. index: of all pipeline stages."""

    def __init__(self, held: Mapping[Place, Tensor], mesh: Mesh):
        self._held, self._mesh, self._group = held, mesh, mesh.group("pp")
        stages: list[Any] = [{at: _info(p) for at, p in held.items()}]
        if self._group is not None:
            stages *= mesh.size("pp")
            dist.all_gather_object(stages, stages[0], group=self._group)
        self.index: dict[Place, TensorInfo] = {}
        self._stage: dict[Place, int] = {}
        for number, stage in enumerate(stages):
            for at, info in stage.items():
                if at not in self.index:
                    self.index[at], self._stage[at] = info, number

    def ask(self, at: Place) -> Tensor:
        """Return a tensor whole; on the first rank."""
        self.tell(at)
        tensor = self._take_part(at)
        assert tensor is not None
        return tensor

    def serve(self) -> None:
        """Take part in what the first rank asks for, until it is done. Raises SaidError where it fails."""
        while (at := self.tell(_END)) != _END:
            if at == _FAILED:
                raise SaidError("the first rank could not write")
            self._take_part(at)

    def tell(self, at: Place) -> Place:
        """Return what the first rank says."""
        told = [at]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def _take_part(self, at: Place) -> Tensor | None:
        """Gather a tensor where it is held, and bring it to the first rank, which alone returns it."""
        stage, mesh = self._stage[at], self._mesh
        mine = (self._group is None or stage == mesh.place("pp")) and at in self._held
        tensor = _gathered(self._held[at]) if mine else None
        if self._group is None or stage == 0:
            return tensor if mesh.is_first else None
        if mesh.is_first:
            shape, dtype = self.index[at]
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            dist.recv(tensor, group=self._group, group_src=stage)
            return tensor
        if tensor is not None and all(mesh.place(axis) == 0 for axis in AXES if axis != "pp"):
            dist.send(tensor, group=self._group, group_dst=0)
        return None


def _gathered(parameter: Tensor) -> Tensor:
    """Return a parameter whole on the CPU; collective over its mesh where it is spread."""
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole.detach().cpu().contiguous()


def _info(parameter: Tensor) -> TensorInfo:
    return TensorInfo(tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))


def _by_key(
    index: Mapping[Place, TensorInfo], keys: Mapping[str, Any], load: Callable[[Place], Tensor]
) -> dict[str, Tensors]:
    def of(key: str) -> Tensors:
        own = {name: info for (owner, name), info in index.items() if owner == key}
        return Tensors(own, lambda name: load((key, name)))

    return {key: of(key) for key in keys}
