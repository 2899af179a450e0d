"""A rank of a planned run: what it has, and what it computes in a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from cvx_parallel.tensor import matching, shares
from cvx_plugins.plan.layout import ROWS, Layout
from cvx_plugins.plan.passes import Passes


class Sent(NamedTuple):
    """All of one kind along one axis.

    kind: all_reduce, all_gather, reduce_scatter, broadcast, all_to_all or send. size: bytes of what is
    reduced, gathered or broadcast, as a whole; of an all-to-all or a send, bytes that leave this rank.
    """

    kind: str
    axis: str
    size: int


@dataclass(frozen=True)
class Member:
    """A rank. Of its tokens, text comes first; heads are those that tp leaves it."""

    passes: Passes
    rank: int

    @property
    def layout(self) -> Layout:
        return self.passes.layout

    def size(self, axis: str) -> int:
        """Return the ranks along an axis; along `chunks` all or some of `model`: those that share a clip."""
        if axis == "chunks":
            ranks, batch = self.layout.size("model"), self.layout.spec.loader.batch
            return ranks // (math.gcd(ranks, batch) if "encoder-dp" in self.layout.strategies else 1)
        return self.layout.size(axis)

    def place(self, axis: str) -> int:
        """Return this rank's place along an axis."""
        if axis == "chunks":
            return self.place("model") % self.size("chunks")
        return self.layout.degrees.coordinate(self.rank, axis)

    def option(self, strategy: str, field: str) -> Any:
        """Return a field of a strategy, None where the recipe has no such strategy."""
        return getattr(self.layout.strategies.get(strategy), field, None)

    @cached_property
    def names(self) -> list[str]:
        """Parameters that it has a part of."""
        return self.layout.names(self.place("pp"))

    @cached_property
    def trained(self) -> list[str]:
        """Those of them that are trained."""
        return [name for name in self.names if name in self.layout.trainable]

    def count(self, name: str) -> int:
        """Return the elements of a parameter that tp leaves."""
        return math.prod(self.layout.unsharded(name, self.rank))

    @property
    def slices(self) -> bool:
        """Whether ranks that hold the same update some rows each, and exchange them."""
        return any(use in self.layout.strategies for use in ROWS)

    @property
    def splits_passes(self) -> bool:
        """Whether backward passes are split, so that parameters stay gathered for a whole batch."""
        return bool(self.option("pp", "schedule") == "zero-bubble")

    @property
    def shares_sequence(self) -> bool:
        """Whether tp shares out tokens too."""
        return self.size("tp") > 1 and bool(self.option("tp", "sequence"))

    @cached_property
    def stages(self) -> range:
        """Stages of the pipeline that it has."""
        return self.layout.stages_of(self.place("pp"))

    @property
    def is_last(self) -> bool:
        """Whether it computes the loss."""
        return len(self.layout.stages) - 1 in self.stages

    @cached_property
    def blocks(self) -> list[str]:
        """Names of its blocks."""
        return [name for stage in self.stages for name in self.layout.stages[stage]]

    @cached_property
    def recomputed(self) -> list[str]:
        """Names of those that are computed again in the backward pass."""
        every = self.option("recompute", "every")
        return self.blocks[::every] if every is not None else []

    @property
    def batches(self) -> int:
        """Batches of a step."""
        return int(self.layout.spec.config("task").accumulate)

    @property
    def rows(self) -> int:
        """Rows that go through each of its blocks in a step."""
        return self.batches * self.layout.spec.loader.batch

    @property
    def calls(self) -> int:
        """Times that each of its blocks is called in a step, to compute forward."""
        batch = self.layout.spec.loader.batch
        return self.batches * (self.layout.strategies["pp"].parts(batch) if self.size("pp") > 1 else 1)

    @property
    def each(self) -> int:
        """Bytes of an element of what it computes."""
        return self.passes.dtype.itemsize

    @property
    def wide(self) -> int:
        """Bytes of an element of what it keeps."""
        return self.layout.dtype.itemsize

    @property
    def width(self) -> int:
        """Elements of a token."""
        return int(self.passes.outline.video.shape[2])

    @property
    def text(self) -> int:
        """Tokens of the text."""
        return int(self.passes.outline.text.shape[1])

    @cached_property
    def runs(self) -> tuple[int, ...]:
        """Tokens of the video, by place along cp."""
        return shares(int(self.passes.outline.video.shape[1]), self.size("cp"))

    @property
    def video(self) -> int:
        """Tokens of the video in its attention layers' inputs."""
        return self.runs[self.place("cp")]

    @property
    def heads(self) -> int:
        """Heads that tp leaves it."""
        return shares(self.layout.plan.num_heads, self.size("tp"))[self.place("tp")]

    @property
    def head_width(self) -> int:
        """Elements of a head."""
        return self.width // self.layout.plan.num_heads

    @cached_property
    def starts_frozen(self) -> bool:
        """Whether its first block's layers get no gradient back to where they enter: nothing before them is
        trained, as with adapters, and no stage.
        """
        layout = self.layout
        layers = (*layout.plan.attend, *layout.plan.column, *layout.plan.row)
        around = tuple(f"{name}." for name in matching(layout.predictor, layers))
        later = (*around, *(f"{head}." for head in layout.plan.head))
        before = [name for name in self.trained if layout.unit(name) in ("", self.blocks[0])]
        return 0 in self.stages and all(name.startswith(later) for name in before)

    @cached_property
    def attention(self) -> tuple[str, ...]:
        """What names of parameters in attention layers begin with."""
        return tuple(f"{name}." for name in matching(self.layout.predictor, self.layout.plan.attend))

    def is_inside_attention(self, name: str) -> bool:
        """Tell whether a parameter lies in an attention layer."""
        return name.startswith(self.attention)
