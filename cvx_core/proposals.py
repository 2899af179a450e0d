"""Ways out of a mesh that does not multiply out: other sizes, or other numbers of processes. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cvx_core.degrees import DATA, JOINED, Degrees, Limits, Request

TRIES = 256
"""Numbers of processes, on either side of that at hand, which are tried before nothing is proposed."""


@dataclass(frozen=True)
class Knob:
    """A size that a recipe states, as a message names it; the ranks along its axes, multiplied.

    size: None where it takes what is left; usual: what it is where the recipe does not say, but no more than
    the ranks along the axes of `among`.
    """

    owner: int
    label: str
    axes: tuple[str, ...]
    size: int | None
    usual: int | None = None
    among: tuple[str, ...] = ()

    def differs(self, mesh: Degrees) -> bool:
        """Tell whether a recipe with that mesh has to state another size."""
        found = _along(mesh, self.axes)
        if self.usual is not None:
            return found != min(self.usual, _along(mesh, self.among))
        return self.size not in (None, found)


@dataclass(frozen=True)
class Proposal:
    """A way out. changes: {size: what it is to be}; adds_ddp: ranks are left that nobody has asked for."""

    world: int
    changes: Mapping[Knob, int] = field(default_factory=dict)
    adds_ddp: bool = False


def knobs(requests: Sequence[Request]) -> list[Knob]:
    """Return the sizes that requests are made of: one for each field that states some."""
    return [knob for owner, request in enumerate(requests) for knob in _knobs(owner, request)]


def multiplied(requests: Sequence[Request], world: int) -> Degrees | None:
    """Return the mesh of `world` ranks that is asked for, None where sizes do not multiply out."""
    sizes = {axis: size for request in requests for axis, size in request.degrees.items()}
    usual = _giving_way(requests)
    left, rest = divmod(world, _stated(requests))
    for axis, most in usual.items() if not rest else ():
        sizes[axis] = min(most, left)
        left, rest = divmod(left, min(most, left))
        if rest:
            break
    open_axes = [axis for axis, size in sizes.items() if size is None]
    if rest or (left != 1 and not open_axes):
        return None
    return Degrees({axis: left if size is None else size for axis, size in sizes.items()})


def factors(requests: Sequence[Request], world: int) -> list[tuple[Knob, str, int]]:
    """Return what the recipe's sizes multiply to: (a size, how it is called, its ranks) of more than one."""
    left, rest = divmod(world, _stated(requests))
    found = []
    for knob in knobs(requests):
        size, request = knob.size, requests[knob.owner]
        if knob.axes[0] in _giving_way(requests):
            size = None if rest else min(knob.usual or 1, left)
        axes = {axis for axis in request.degrees if axis not in request.kept}
        wider = [other for other in knobs([request]) if set(other.axes) > set(knob.axes)]
        if size is not None and size > 1 and all(other.size is None for other in wider):
            found.append((knob, request.name if set(knob.axes) == axes else knob.label, size))
    return found


def nearest(requests: Sequence[Request], world: int, limits: Limits = ()) -> Degrees | None:
    """Return the mesh of `world` ranks that changes the fewest of the sizes asked for, and these the least.

    Where nobody owns the data axes, they count as one rank, and changing that is preferred. Requests are
    checked. None where there is no mesh within the limits.
    """
    axes = [axis for r in requests for axis in r.degrees if axis not in r.kept]
    is_cheap = not any(axis in DATA for r in requests for axis in r.degrees)
    given = knobs(requests)
    meshes = _meshes(world, [*axes, *(["dp_replicate"] if is_cheap else [])], limits)
    return min(meshes, key=lambda mesh: _cost(given, mesh, is_cheap), default=None)


def proposed(requests: Sequence[Request], world: int, limits: Limits = ()) -> list[Proposal]:
    """Return ways out, each within the limits: sizes for `world` ranks, and worlds for the sizes."""
    found = [_of(requests, near)] if (near := nearest(requests, world, limits)) is not None else []
    found += [Proposal(number) for number in _worlds(requests, world, limits)]
    if near is None and _lacks_data(requests):
        wider = [*requests, Request("ddp", {"dp_replicate": None})]
        found += [Proposal(number, adds_ddp=True) for number in _worlds(wider, world, limits)]
    return found or [*_beside(requests, world, limits, -1), *_beside(requests, world, limits, 1)]


def said(proposals: Iterable[Proposal], world: int) -> str:
    """Return ways out as advice."""
    by_steps: dict[tuple[str, bool], list[int]] = {}
    for one in proposals:
        by_steps.setdefault((_steps(one), one.world == world), []).append(one.world)
    parts = []
    for (steps, is_here), worlds in by_steps.items():
        start = f"start {' or '.join(map(str, worlds))} {'process' if worlds == [1] else 'processes'}"
        parts.append(" and ".join(part for part in (steps, "" if is_here else start) if part))
    text = ", or ".join(parts) or "nothing fits: no sizes of these strategies are allowed together"
    return f"{text[0].upper()}{text[1:]}."


def _knobs(owner: int, request: Request) -> Iterator[Knob]:
    own = tuple(axis for axis in request.degrees if axis not in request.kept)
    for name, axes in request.fields.items():
        sizes = [request.degrees[axis] for axis in axes]
        size = None if None in sizes else math.prod(size or 1 for size in sizes)
        usual = request.usual.get(axes[0]) if len(axes) == 1 else None
        yield Knob(owner, f"{request.name}.{name}", axes, size, usual, own)
    for axis in own:
        if all(axis not in axes for axes in request.fields.values()):
            label = request.name if len(own) == 1 else f"{request.name} {axis}"
            yield Knob(owner, label, (axis,), request.degrees[axis])


def _giving_way(requests: Sequence[Request]) -> dict[str, int]:
    """Return the axes whose usual size is no more than what others leave, with that size."""
    return {axis: most for r in requests if None in r.degrees.values() for axis, most in r.usual.items()}


def _stated(requests: Sequence[Request]) -> int:
    """Return the ranks that the sizes ask for."""
    usual = _giving_way(requests)
    sizes = [size for r in requests for axis, size in r.degrees.items() if axis not in usual]
    return math.prod(size for size in sizes if size is not None)


def _lacks_data(requests: Sequence[Request]) -> bool:
    return not any(axis in DATA for request in requests for axis in request.degrees)


def _meshes(world: int, axes: Sequence[str], limits: Limits) -> Iterator[Degrees]:
    """Yield every mesh of `world` ranks over some axes that keeps to the limits."""

    for axis, allowed in limits:  # nobody owns it, so it has one rank
        if 1 not in allowed and not {*JOINED.get(axis, (axis,))} & {*axes}:
            return iter(())

    def divided(rest: int, place: int) -> Iterator[dict[str, int]]:
        if place == len(axes):
            yield from [{}] if rest == 1 else []
            return
        own = [allowed for axis, allowed in limits if axis == axes[place]]
        for size in [rest] if place == len(axes) - 1 else _divisors(rest):
            if all(size in allowed for allowed in own):
                for others in divided(rest // size, place + 1):
                    yield {axes[place]: size, **others}

    return (mesh for mesh in map(Degrees, divided(world, 0)) if mesh.keeps(limits))


def _cost(given: Iterable[Knob], mesh: Degrees, is_cheap: bool) -> float:
    """Return what a mesh changes: any change more than any distance; of equal ones, data axes less."""
    added = mesh.size("batch") if is_cheap else 1
    cost = 500.0 + math.log(added) if added > 1 else 0.0
    for knob in given:
        if knob.differs(mesh):
            distance = abs(math.log(_along(mesh, knob.axes) / (knob.usual or knob.size or 1)))
            cost += 1000.0 + distance - (0.01 if knob.axes[-1] in DATA else 0.0)
    return cost


def _of(requests: Sequence[Request], mesh: Degrees) -> Proposal:
    changes = {knob: _along(mesh, knob.axes) for knob in knobs(requests) if knob.differs(mesh)}
    return Proposal(mesh.world, changes, _lacks_data(requests) and mesh.size("batch") > 1)


def _worlds(requests: Sequence[Request], world: int, limits: Limits) -> list[int]:
    """Return the numbers of processes nearest to `world`, one below and one above, that fit as it is."""
    base = _stated(requests)
    if not any(None in request.degrees.values() for request in requests):
        return [base] if base != world and _fits(requests, base, limits) else []
    first = world // base * base
    below = (number for number in range(first, max(0, first - TRIES * base), -base))
    above = (number for number in range(first + base, first + TRIES * base, base))
    found = [next((n for n in side if _fits(requests, n, limits)), None) for side in (below, above)]
    return [number for number in found if number is not None]


def _fits(requests: Sequence[Request], world: int, limits: Limits) -> bool:
    mesh = multiplied(requests, world)
    return mesh is not None and mesh.keeps(limits)


def _beside(requests: Sequence[Request], world: int, limits: Limits, way: int) -> list[Proposal]:
    """Return the nearest number of processes on one side for which there are sizes, with them."""
    for number in range(world + way, max(0, world + way * TRIES), way):
        if (mesh := nearest(requests, number, limits)) is not None:
            return [_of(requests, mesh)]
    return []


def _steps(proposal: Proposal) -> str:
    steps = [f"{knob.label} to {size}" for knob, size in proposal.changes.items()]
    parts = [f"set {' and '.join(steps)}"] if steps else []
    return " and ".join([*parts, *(["add `- {use: ddp}`"] if proposal.adds_ddp else [])])


def _along(mesh: Degrees, axes: Iterable[str]) -> int:
    return math.prod(mesh.size(axis) for axis in axes)


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return [*small, *(number // n for n in reversed(small) if n * n != number)]
