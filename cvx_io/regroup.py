"""Steps from one set of tensor names to another: what is cut and joined, and streaming through it.

Names tables make the steps (see rename.py); importing this module does not import torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cvx_core.errors import FormatError
from cvx_core.interfaces import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, tuple[int, ...]]
"""{tensor name: the parts it consists of, in its own order along dim 0}."""


@dataclass(frozen=True)
class Step:
    """One group of tensors: sources are cut into equal parts, each target joins those listed for it."""

    parts: int
    sources: Parts
    targets: Parts

    @property
    def key(self) -> str:
        """A name that no other step of the same direction has."""
        return next(iter(self.sources))

    def infos(self, sources: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Return shape and dtype of every target. Raises FormatError where they cannot be cut or joined."""
        if self.parts == 1:
            return dict(zip(self.targets, sources.values(), strict=True))
        pieces = {_piece(name, info, len(self.sources[name])) for name, info in sources.items()}
        if len(pieces) > 1:
            shapes = ", ".join(f"{name} {list(info.shape)} {info.dtype}" for name, info in sources.items())
            raise FormatError(
                f"tensors that belong together differ in shape or dtype: {shapes}. Export them again."
            )
        ((rows, *rest), dtype) = pieces.pop()
        return {name: TensorInfo((rows * len(own), *rest), dtype) for name, own in self.targets.items()}

    def run(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the targets. A target that is one part is a view of its source; others are copies."""
        if self.parts == 1:
            yield from zip(self.targets, tensors.values(), strict=True)
            return
        import torch

        self.infos({name: describe(tensor) for name, tensor in tensors.items()})
        pieces: dict[int, Tensor] = {}
        for name, own in self.sources.items():
            pieces.update(zip(own, tensors[name].tensor_split(len(own)), strict=True))
        for name, own in self.targets.items():
            yield name, pieces[own[0]] if len(own) == 1 else torch.cat([pieces[part] for part in own])


@dataclass(frozen=True)
class Renaming:
    """What a table does to one known set of names.

    steps: in the order of the names they came from; dropped: {name left out: reason}; wanted: the targets to
    yield, None for all.
    """

    steps: tuple[Step, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)
    wanted: frozenset[str] | None = None

    @property
    def sources(self) -> list[str]:
        """The names to read. Read in this order, no more than one group is ever held."""
        return [name for step in self.steps for name in step.sources]

    def only(self, wanted: Collection[str], where: str = "") -> Renaming:
        """Return the part that produces `wanted`. Raises FormatError for a name that no step produces."""
        made = {name for step in self.steps for name in step.targets}
        if unknown := [name for name in wanted if name not in made]:
            near = nearest(unknown[0], made)
            raise FormatError(f"{at(where)}has no {listed(unknown)}.{near} Ask for names that its index has.")
        keep = frozenset(wanted)
        return Renaming(tuple(step for step in self.steps if keep & step.targets.keys()), self.dropped, keep)

    def index(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Return shape and dtype of every wanted target, from those of the sources."""
        made: dict[str, TensorInfo] = {}
        for step in self.steps:
            made |= step.infos({name: infos[name] for name in step.sources})
        return {name: info for name, info in made.items() if self._wants(name)}

    def apply(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Turn a stream of sources into the wanted targets; holds the tensors of unfinished groups only."""
        owner = {name: step for step in self.steps for name in step.sources}
        return (item for item in flow(tensors, owner.get) if self._wants(item[0]))

    def _wants(self, name: str) -> bool:
        return self.wanted is None or name in self.wanted


def flow(
    tensors: Iterable[tuple[str, Tensor]], step_of: Callable[[str], Step | None]
) -> Iterator[tuple[str, Tensor]]:
    """Run each tensor's step as soon as its group is complete.

    Raises FormatError for a tensor without a step, a target produced twice, and groups left incomplete.
    """
    waiting: dict[str, dict[str, Tensor]] = {}
    made: set[str] = set()
    for name, tensor in tensors:
        step = step_of(name)
        if step is None:
            raise FormatError(f"tensor {name!r} matches no rule. Wrong model or format?")
        waiting.setdefault(step.key, {})[name] = tensor
        if len(waiting[step.key]) < len(step.sources):
            continue
        group = waiting.pop(step.key)
        if twice := made & step.targets.keys():
            raise FormatError(f"{listed(sorted(twice))} would be produced twice, now from {name!r}.")
        made |= step.targets.keys()
        yield from step.run({source: group[source] for source in step.sources})
    if waiting:
        held = [name for group in waiting.values() for name in group]
        raise FormatError(
            f"{listed(held)}: the tensors they are joined with never came. Is the source complete?"
        )


def describe(tensor: Tensor) -> TensorInfo:
    """Return a tensor's shape and dtype name."""
    return TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def at(where: str) -> str:
    """Return the start of a message about `where`."""
    return f"{where}: " if where else ""


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first few names for a message, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def nearest(name: str, options: Collection[str], what: str = "name") -> str:
    """Return " Nearest name: 'x'." for a message, however far it is."""
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.0)
    return f" Nearest {what}: {near[0]!r}." if near else ""


def _piece(name: str, info: TensorInfo, count: int) -> TensorInfo:
    if not info.shape or info.shape[0] % count:
        raise FormatError(
            f"{name!r} has shape {list(info.shape)}, but consists of {count} equal parts along dim 0. "
            "Wrong model or format?"
        )
    return TensorInfo((info.shape[0] // count, *info.shape[1:]), info.dtype)
