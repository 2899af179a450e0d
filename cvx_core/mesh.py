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
    "model": ("cfg", "pp", "ring", "ulysses", "tp"),
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
    """What one strategy asks for. degrees: {axis: ranks, None to take what is left}; a data axis that it
    keeps at one rank comes before the one it uses.
    """

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
        return f"{' x '.join(parts)} = {self.world} processes" if parts else "one process"


def solve(requests: Sequence[Request], world: int) -> Degrees:
    """Return the degrees of a mesh of `world` ranks. Raises MeshError with the arithmetic and a way out."""
    check(requests)
    if not requests and world > 1:
        raise MeshError(
            f"nothing says how {world} processes share the work. Add `parallel: [{{use: ddp}}]`, "
            "or start one process."
        )
    stated = {axis: size for r in requests for axis, size in r.degrees.items() if size is not None}
    open_axes = [axis for r in requests for axis, size in r.degrees.items() if size is None]
    product = math.prod(stated.values())
    if world % product == 0 and (open_axes or product == world):
        return Degrees({**stated, **dict.fromkeys(open_axes, world // product)})
    labels = _labels(requests)
    factors = [f"{labels[axis]} {size}" for axis, size in stated.items() if size > 1]
    arithmetic = " x ".join(factors) + (f" = {product}" if len(factors) > 1 else "")
    fault = f"but there are {world} processes"
    if open_axes:
        fault = (
            f"which does not divide {world} processes, so nothing whole is left for {labels[open_axes[0]]}"
        )
    if not factors:
        arithmetic, fault = f"the mesh has one rank, but there are {world} processes", ""
    near = nearest(requests, world)
    changed = [axis for axis, size in near.sizes.items() if stated.get(axis, size) != size]
    owners = {axis: index for index, r in enumerate(requests) for axis in r.degrees}
    owner = owners[changed[0]] if len({owners[axis] for axis in changed}) == 1 else None
    remedy = _remedy(requests, near, changed, labels, _other_worlds(product, world, bool(open_axes)))
    raise MeshError(f"{', '.join(part for part in (arithmetic, fault) if part)}. {remedy}", owner)


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


def nearest(requests: Sequence[Request], world: int) -> Degrees:
    """Return the mesh of `world` ranks that changes the fewest of the sizes asked for, and these the least.

    Where nobody owns the data axes, they count as one rank, and changing that is preferred. Requests are
    checked.
    """
    kept = {axis for request in requests for axis in _kept(request)}
    wanted = {axis: size for r in requests for axis, size in r.degrees.items() if axis not in kept}
    cheap: tuple[str, ...] = ()
    if not any(axis in wanted for axis in DATA):
        wanted["dp_replicate"], cheap = 1, ("dp_replicate",)
    best: dict[int, tuple[float, dict[str, int]]] = {1: (0.0, {})}  # by product of the axes seen so far
    for axis, size in wanted.items():
        following: dict[int, tuple[float, dict[str, int]]] = {}
        for product, (cost, sizes) in best.items():
            for other in _divisors(world // product):
                extra = 0.0 if size in (None, other) else _change(axis, size or 1, other, axis in cheap)
                step = (cost + extra, {**sizes, axis: other})
                if product * other not in following or step[0] < following[product * other][0]:
                    following[product * other] = step
        best = following
    return Degrees(best[world][1])


def _change(axis: str, size: int, other: int, is_cheap: bool) -> float:
    """Return what changing a size costs: any change more than any distance; of equal ones, data axes less."""
    return (500.0 if is_cheap else 1000.0) + abs(math.log(other / size)) - (0.01 if axis in DATA else 0.0)


def _kept(request: Request) -> list[str]:
    """Return the data axes that a strategy owns only to keep others off: all but its last, of one rank."""
    data = [axis for axis in request.degrees if axis in DATA]
    return [axis for axis in data[:-1] if request.degrees[axis] == 1]


def _labels(requests: Sequence[Request]) -> dict[str, str]:
    """Return how a message names each axis: by its strategy, with the axis where the strategy has several."""
    result = {}
    for request in requests:
        kept = _kept(request)
        alone = len(request.degrees) - len(kept) == 1
        for axis in request.degrees:
            result[axis] = request.name if alone and axis not in kept else f"{request.name} {axis}"
    return result


def _remedy(
    requests: Sequence[Request],
    near: Degrees,
    changed: Sequence[str],
    labels: Mapping[str, str],
    worlds: Sequence[int],
) -> str:
    """Return the nearest mesh as advice."""
    asked = {axis for request in requests for axis in request.degrees}
    steps = [f"{labels[axis]} to {near.sizes[axis]}" for axis in changed]
    parts = [f"Set {' and '.join(steps)}"] if steps else []
    if any(size > 1 and axis not in asked for axis, size in near.sizes.items()):
        parts.append(f"{'add' if parts else 'Add'} `- {{use: ddp}}`")
    noun = "process" if list(worlds) == [1] else "processes"
    return f"{' and '.join(parts)}, or start {' or '.join(map(str, worlds))} {noun}."


def _other_worlds(product: int, world: int, is_open: bool) -> list[int]:
    """Return the numbers of processes nearest to `world` that would fit."""
    if not is_open:
        return [product]
    below = world // product * product
    return [number for number in (below, below + product) if number]


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
