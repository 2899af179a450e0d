"""Parts of whole tensors on torch's meshes, shared out along more axes than the parameter they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from cvx_core.mesh import AXES, JOINED, Mesh
from cvx_parallel.optimizer_state import contiguous, whole_shape


class Layouts:
    """Torch's meshes over axes in the order in which they divide rows; each is made once."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._made: dict[tuple[str, ...], DeviceMesh] = {}

    def part(self, param: Tensor, axis: str, value: Tensor) -> DTensor:
        """Return this rank's rows, along one more axis, of something that has the rows of a parameter."""
        dims = [*_sharded(param), (axis, Shard(0))]
        dims = [(axis, placement) for axis, placement in dims if self._mesh.size(axis) > 1]
        axes = tuple(axis for axis, _ in dims)
        if axes not in self._made:
            self._made[axes] = ordered(self._mesh, axes)
        shape = whole_shape(param, value)
        stride = param.stride() if shape == param.shape else contiguous(shape)
        placements = [placement for _, placement in dims]
        return DTensor.from_local(
            value, self._made[axes], placements, run_check=False, shape=shape, stride=stride
        )


def is_part(value: Tensor, axis: str) -> bool:
    """Tell whether a tensor is shared out along an axis."""
    names = value.device_mesh.mesh_dim_names or () if isinstance(value, DTensor) else ()
    return axis in names and value.placements[names.index(axis)].is_shard()  # type: ignore[attr-defined]


def _sharded(param: Tensor) -> list[tuple[str, Shard]]:
    """Return the axes along which a parameter is sharded, those that divide it first coming first.

    FSDP divides what tp has left, but its dim of the mesh is the outer one, so it says strided.
    """
    if not isinstance(param, DTensor):
        return []
    names = param.device_mesh.mesh_dim_names
    assert names is not None
    dims = [(name, p) for name, p in zip(names, param.placements, strict=True) if not p.is_replicate()]
    dims.sort(key=lambda dim: hasattr(dim[1], "split_factor"))
    return [(name, Shard(placement.dim)) for name, placement in dims]  # type: ignore[attr-defined]


def ordered(mesh: Mesh, axes: Sequence[str]) -> DeviceMesh:
    """Return torch's mesh over axes in any order, on the groups there are."""
    inside = [name for axis in axes for name in JOINED.get(axis, (axis,))]
    outside = [name for name in AXES if name not in inside]
    world = torch.arange(mesh.degrees.world).reshape([mesh.size(axis) for axis in AXES])
    mine = world.permute([AXES.index(name) for name in (*outside, *inside)])
    mine = mine[tuple(mesh.place(name) for name in outside)].reshape([mesh.size(axis) for axis in axes])
    groups: Any = [mesh.along(axis).get_group() for axis in axes]
    kind = mesh.along(axes[0]).device_type
    return DeviceMesh.from_group(groups, kind, mesh=mine.contiguous(), mesh_dim_names=tuple(axes))
