"""The device mesh: degrees that multiply out to the world, and groups. No torch until one is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cvx_core.degrees import AXES, DATA, JOINED, SEVERAL, Degrees, Limits, Request
from cvx_core.errors import CvxError
from cvx_core.proposals import factors, multiplied, proposed, said

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["AXES", "DATA", "JOINED", "SEVERAL", "Degrees", "Mesh", "MeshError", "Request", "check", "solve"]


class MeshError(CvxError):
    """Degrees that do not make a mesh. owner: index in the recipe's `parallel` list, None for all of it."""

    def __init__(self, message: str, owner: int | None = None):
        super().__init__(message)
        self.owner = owner


def solve(requests: Sequence[Request], world: int, limits: Limits = ()) -> Degrees:
    """Return the degrees of a mesh of `world` ranks. Raises MeshError with the arithmetic and a way out.

    limits: what the way out keeps to. Sizes that are asked for are not held against them here.
    """
    check(requests)
    if world < 1:
        raise MeshError(f"a run has {world} processes. Give 1 or more.")
    if not requests and world > 1:
        raise MeshError(
            f"nothing says how {world} processes share the work. Add `parallel: [{{use: ddp}}]`, "
            "or start one process."
        )
    if (found := multiplied(requests, world)) is not None:
        return found
    ways = proposed(requests, world, limits)
    owners = {knob.owner for way in ways for knob in way.changes}
    if not owners and not any(way.adds_ddp for way in ways):
        owners = {knob.owner for knob, _, _ in factors(requests, world)}
    owner = owners.pop() if len(owners) == 1 else None
    raise MeshError(f"{_arithmetic(requests, world)}. {said(ways, world)}", owner)


def check(requests: Sequence[Request]) -> None:
    """Check what does not depend on the number of ranks. Raises MeshError: sizes below 1, strategies given
    twice, axes that two own, two that take what is left.
    """
    owners: dict[str, int] = {}
    takes: int | None = None
    for index, request in enumerate(requests):
        if request.name in (other.name for other in requests[:index]):
            raise MeshError(f"{request.name!r} is given twice. Keep one.", index)
        for axis, size in request.degrees.items():
            if axis not in AXES:
                raise MeshError(
                    f"{request.name!r} asks for axis {axis!r}; a mesh has {', '.join(AXES)}.",
                    index,
                )
            if size is not None and size < 1:
                raise MeshError(
                    f"{request.name!r} asks for {size} ranks along {axis}. Give 1 or more.", index
                )
            if axis in owners:
                other = requests[owners[axis]].name
                raise MeshError(f"{request.name!r} and {other!r} both own axis {axis}. Keep one.", index)
            owners[axis] = index
            if size is None and takes is not None:
                raise MeshError(
                    f"{request.name!r} and {requests[takes].name!r} both take what is left of the ranks "
                    "(size: auto). State the size of one of them.",
                    index,
                )
            takes = index if size is None else takes


def _arithmetic(requests: Sequence[Request], world: int) -> str:
    """Return what the sizes multiply to, and what is wrong with it."""
    found = factors(requests, world)
    if not found:
        return f"the mesh has one rank, but there are {world} processes"
    product = math.prod(size for _, _, size in found)
    text = " x ".join(f"{name} {size}" for _, name, size in found)
    text += f" = {product}" if len(found) > 1 else ""
    takes = [index for index, r in enumerate(requests) if None in r.degrees.values()]
    if not takes:
        return f"{text}, but there are {world} processes"
    alone = {knob.owner for knob, _, _ in found} == set(takes)
    rest = "" if alone else f", so nothing whole is left for {requests[takes[0]].name}"
    return f"{text}, which does not divide {world} processes{rest}"


class Mesh:
    """The ranks of a run, by axis. Alone, every axis has one rank and there are no groups."""

    def __init__(self, degrees: Degrees, rank: int = 0, device_type: str = "cpu"):
        self.degrees, self.rank, self._device_type = degrees, rank, device_type
        self._made: dict[tuple[str, ...], Any] = {}

    def size(self, axis: str) -> int:
        """Return the ranks along an axis, or along axes that are used as one."""
        return self.degrees.size(axis)

    def place(self, axis: str) -> int:
        """Return this rank's place along an axis, or along axes that are used as one."""
        return self.degrees.coordinate(self.rank, axis)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes logs and files for all."""
        return self.rank == 0

    def along(self, *axes: str) -> DeviceMesh:
        """Return torch's mesh over some axes of more than none; joined ones as one dim under their name."""
        if axes not in self._made:
            self._made[axes] = self._slice(axes)
        mesh: DeviceMesh = self._made[axes]
        return mesh

    def group(self, axis: str) -> ProcessGroup | None:
        """Return the process group along an axis, or None where it has one rank."""
        return self.along(axis).get_group() if self.size(axis) > 1 else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.degrees.world > 1:
            import torch.distributed as dist

            dist.barrier()

    def _slice(self, axes: tuple[str, ...]) -> Any:
        root = self._root()
        for axis in axes if len(axes) > 1 else ():
            if axis in JOINED:
                self.along(axis)  # torch knows a joined axis once it has been made
        if len(axes) == 1 and axes[0] in JOINED:
            names = JOINED[axes[0]]
            return root[names]._flatten(axes[0]) if len(names) > 1 else root[names[0]]
        return root[axes if len(axes) > 1 else axes[0]]

    def _root(self) -> Any:
        if () not in self._made:
            from torch.distributed.device_mesh import init_device_mesh

            shape = tuple(self.degrees.size(axis) for axis in AXES)
            self._made[()] = init_device_mesh(self._device_type, shape, mesh_dim_names=AXES)
        return self._made[()]
