"""Steps from one set of tensor names to another: what is cut and joined, one target at a time.

Names tables make the steps (see rename.py); importing this module does not import torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from cvx_core.errors import FormatError
from cvx_core.interfaces import TensorInfo, Tensors
from cvx_io.pieces import ByPieces, pieces, rows

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

    def make(
        self, target: str, source: Callable[[str], Iterable[Tensor]], index: Mapping[str, TensorInfo]
    ) -> Iterator[Tensor]:
        """Yield the pieces of one target. source: gives those of a source; index: sources' shapes."""
        if self.parts == 1:
            yield from source(self.key)
            return
        place = {part: (name, nth) for name, own in self.sources.items() for nth, part in enumerate(own)}
        for part in self.targets[target]:
            name, nth = place[part]
            length = index[name].shape[0] // len(self.sources[name])
            yield from rows(source(name), nth * length, (nth + 1) * length)

    def needed(self, target: str) -> list[str]:
        """Return the sources that a target takes parts of."""
        parts = set(self.targets[target])
        return [name for name, own in self.sources.items() if parts & set(own)]


@dataclass(frozen=True)
class Renaming:
    """What a table does to one known set of names.

    steps: in the order of the names they came from; dropped: {name left out: reason}.
    """

    steps: tuple[Step, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)

    def index(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Return shape and dtype of every target, from those of the sources."""
        made: dict[str, TensorInfo] = {}
        for step in self.steps:
            made |= step.infos({name: infos[name] for name in step.sources})
        return made

    def tensors(self, source: Tensors) -> Tensors:
        """Return the targets; each is made of its sources when it is loaded.

        Sources that several targets take parts of are kept until a target of others is loaded.
        """
        owner = {target: step for step in self.steps for target in step.targets}
        held: dict[str, list[Tensor]] = {}

        def kept(name: str) -> list[Tensor]:
            if name not in held:
                held[name] = list(pieces(source, name))
            return held[name]

        def make(target: str) -> Iterator[Tensor]:
            step = owner[target]
            for name in [name for name in held if name not in step.sources]:
                del held[name]
            once = len(step.targets) == 1
            yield from step.make(target, partial(pieces, source) if once else kept, source.index)

        origins = {target: step.needed(target) for target, step in owner.items()}
        dropped = {**source.dropped, **self.dropped}
        index = self.index(source.index)
        return Tensors(index, ByPieces(index, make), dropped, origins, source.facts)


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
