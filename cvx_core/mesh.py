"""The device mesh: axes, degrees that multiply out to the world, and groups. No torch until one is made.

Order, outermost (slowest links) to innermost: cfg, pp, dp_replicate, dp_shard, ring, ulysses, tp.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cvx_core.errors import CvxError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("cfg", "pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp")
DATA = ("dp_replicate", "dp_shard")
JOINED: Mapping[str, tuple[str, ...]] = {
    "cp": ("ring", "ulysses"),
    "fsdp": ("dp_shard", "ring", "ulysses"),
    "batch": DATA,
    "loss": (*DATA, "ring", "ulysses"),
    "model": ("pp", "ring", "ulysses", "tp"),
}
"""Axes that are used as one. batch: ranks that read different rows; loss: ranks whose gradients are averaged;
fsdp: ranks that share parameters; model: ranks that see the same rows."""


class MeshError(CvxError):
    """Degrees that do not make a mesh. owner: index in the recipe's `parallel` list, None for all of it."""

    def __init__(self, message: str, owner: int | None = None):
        super().__init__(message)
        self.owner = owner


@dataclass(frozen=True)
class Request:
    """What one strategy asks for. degrees: {axis: ranks, None to take what is left}."""

    name: str
    degrees: Mapping[str, int | None]


@dataclass(frozen=True)
class Degrees:
    """Ranks along each axis; an axis that is absent has one."""

    sizes: Mapping[str, int] = field(default_factory=dict)

    def size(self, axis: str) -> int:
        """Return the ranks along an axis, or along axes that are used as one."""
        return math.prod(self.sizes.get(name, 1) for name in JOINED.get(axis, (axis,)))

    @property
    def world(self) -> int:
        """Ranks in all."""
        return math.prod(self.sizes.values())

    def coordinate(self, rank: int, axis: str) -> int:
        """Return a rank's place along an axis, or along joined axes, the outer one counting first."""
        place = {}
        for name in reversed(AXES):
            rank, place[name] = divmod(rank, self.sizes.get(name, 1))
        result = 0
        for name in JOINED.get(axis, (axis,)):
            result = result * self.sizes.get(name, 1) + place[name]
        return result

    def __str__(self) -> str:
        parts = [f"{name} {self.sizes[name]}" for name in AXES if self.sizes.get(name, 1) > 1]
        return " x ".join(parts) or "one process"


def solve(requests: Sequence[Request], world: int) -> Degrees:
    """Return the degrees of a mesh of `world` ranks. Raises MeshError with the arithmetic and a way out."""
    owners = check_owners(requests)
    stated = {
        axis: size for request in requests for axis, size in request.degrees.items() if size is not None
    }
    open_axes = [axis for request in requests for axis, size in request.degrees.items() if size is None]
    product = math.prod(stated.values())
    arithmetic = " x ".join(f"{axis} {size} ({owners[axis][0]})" for axis, size in stated.items()) or "1"
    if len(open_axes) > 1:
        names = " and ".join(f"{axis} ({owners[axis][0]})" for axis in open_axes)
        raise MeshError(f"{names} both take what is left of {world} ranks. State the size of one of them.")
    if open_axes:
        if world % product:
            raise MeshError(
                f"{arithmetic} = {product} does not divide {world} ranks, so nothing whole is left for "
                f"{open_axes[0]} ({owners[open_axes[0]][0]}). {_nearest(stated, owners, world)}"
            )
        return Degrees({**stated, open_axes[0]: world // product})
    if product != world:
        hint = _missing_data(owners, product, world) or _nearest(stated, owners, world)
        raise MeshError(f"{arithmetic} = {product}, but there are {world} ranks. {hint}")
    return Degrees(stated)


def check_owners(requests: Sequence[Request]) -> dict[str, tuple[str, int]]:
    """Return {axis: (strategy, its index)}. Raises MeshError where two own one axis."""
    owners: dict[str, tuple[str, int]] = {}
    for index, request in enumerate(requests):
        for axis in request.degrees:
            if axis in owners:
                raise MeshError(
                    f"{request.name!r} and {owners[axis][0]!r} both own axis {axis} of the mesh. Keep one.",
                    index,
                )
            owners[axis] = (request.name, index)
    return owners


def _missing_data(owners: Mapping[str, Any], product: int, world: int) -> str:
    if any(axis in owners for axis in DATA) or world % product:
        return ""
    return f"Add a data strategy for the other factor of {world // product}, such as `- {{use: zero2}}`."


def _nearest(stated: Mapping[str, int], owners: Mapping[str, tuple[str, int]], world: int) -> str:
    """Return the change of one size that makes a mesh and is smallest."""
    best: tuple[float, str] | None = None
    product = math.prod(stated.values())
    has_data = any(axis in owners for axis in DATA)
    for axis, size in stated.items():
        rest = product // size
        for other in _divisors(world):
            fits = world % (rest * other) == 0 if has_data and axis not in DATA else rest * other == world
            if fits and other != size:
                distance = abs(math.log(other / size))
                if best is None or distance < best[0]:
                    best = (distance, f"With {axis} {other} ({owners[axis][0]}) it would.")
    return best[1] if best else f"Choose sizes whose product is {world}."


def _divisors(number: int) -> Iterable[int]:
    return (n for n in range(1, number + 1) if number % n == 0)


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
