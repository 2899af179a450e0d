"""What strategies ask of a mesh, and the ranks along its axes. No torch.

Order, outermost (slowest links) to innermost: cfg, pp, dp_replicate, dp_shard, ring, ulysses, tp.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from sys import maxsize

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


Limits = Sequence[tuple[str, Container[int]]]
"""(an axis, or axes used as one; numbers of ranks it may have), as often as there is a reason."""
SEVERAL = range(2, maxsize)
"""The limit of what one rank would have no use for."""


@dataclass(frozen=True)
class Request:
    """What one strategy asks for.

    degrees: {axis: ranks, None to take what is left}; a data axis that it keeps at one rank comes before the
    one it uses. fields: {field: axes whose ranks, multiplied, it states}. usual: {axis: ranks it has where
    the recipe does not say}; there it makes do with the data ranks of this strategy where they are fewer.
    """

    name: str
    degrees: Mapping[str, int | None]
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    usual: Mapping[str, int] = field(default_factory=dict)

    @property
    def kept(self) -> list[str]:
        """Data axes that it owns only to keep others off: all but its last, of one rank."""
        data = [axis for axis in self.degrees if axis in DATA]
        return [axis for axis in data[:-1] if self.degrees[axis] == 1]


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

    def keeps(self, limits: Limits) -> bool:
        """Tell whether every axis has a number of ranks that it may have."""
        return all(self.size(axis) in allowed for axis, allowed in limits)
