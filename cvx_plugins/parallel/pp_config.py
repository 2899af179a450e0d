"""Fields of pp: how a predictor is cut, and in which order its stages work. No torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from itertools import accumulate
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from cvx_core import Component, Problem
from cvx_core.config import Positive
from cvx_core.degrees import Degrees
from cvx_core.spec import Spec
from cvx_core.strategy import Ranks, Stage, StrategyConfig

Counts = tuple[Positive | Annotated[tuple[Positive, ...], Field(min_length=1)], ...]
IN_ROUNDS = ("interleaved", "zero-bubble")
"""Schedules that take microbatches in rounds of equal length, and may have several stages on a rank."""


class PipelineConfig(StrategyConfig):
    """Pipeline parallel: ranks hold consecutive blocks and pass microbatches on."""

    stage: ClassVar[Stage] = Stage.PIPELINE
    fields: ClassVar[Mapping[str, tuple[str, ...]]] = {"size": ("pp",)}

    size: Ranks | None = None
    """Ranks along the pipeline; null: as many as `stages` lists, or 2."""
    stages: Counts | None = None
    """Blocks on each rank, such as [10, 11, 11, 10]; or on each stage of each rank, such as [[5, 5], [6, 5]].
    null: as even as they go."""
    virtual: Positive | None = None
    """Stages on each rank; null: as many as `stages` lists, or 2 with `interleaved`, or 1."""
    schedule: Literal["1f1b", "gpipe", "interleaved", "zero-bubble"] = "1f1b"
    """Order of work: one forward, one backward in turn; all forward, then all backward; in turn with several
    stages on a rank; or the last with gradients of weights put off until there is nothing else to do."""
    microbatches: Positive | None = None
    """Parts that the rows of a batch are divided into; null: one per row."""

    @model_validator(mode="after")
    def _consistent(self) -> PipelineConfig:
        if self.stages == ():
            raise ValueError("stages lists no rank; give the blocks of each, such as [2, 2]")
        if self.stages is not None:
            lengths = {len(counts) if isinstance(counts, tuple) else 1 for counts in self.stages}
            if len(lengths) > 1:
                raise ValueError(f"stages lists {sorted(lengths)} stages on ranks; give each as many")
            if self.size is not None and self.size != len(self.stages):
                raise ValueError(f"size is {self.size}, but stages lists {len(self.stages)} ranks")
            if self.virtual is not None and {self.virtual} != lengths:
                raise ValueError(f"virtual is {self.virtual}, but stages lists {lengths.pop()} on each rank")
        if self.per_rank > 1 and self.schedule not in IN_ROUNDS:
            raise ValueError(
                f"schedule {self.schedule!r} has one stage on a rank, not {self.per_rank}; use interleaved"
            )
        if self.per_rank == 1 and self.schedule == "interleaved":
            raise ValueError("schedule 'interleaved' with one stage on a rank is 1f1b; use that")
        return self

    @property
    def ranks(self) -> int:
        """Ranks along the pipeline."""
        return self.size or (len(self.stages) if self.stages is not None else 2)

    @property
    def per_rank(self) -> int:
        """Stages on each rank."""
        if self.stages is not None:
            first = self.stages[0]
            return len(first) if isinstance(first, tuple) else 1
        return self.virtual or (2 if self.schedule == "interleaved" else 1)

    def degrees(self) -> Mapping[str, int | None]:
        return {"pp": self.ranks}

    def limits(self, spec: Spec) -> Mapping[str, Container[int]]:
        """Return those of the stages stated, or 2 to as many as blocks fill and microbatches go through."""
        layers = getattr(spec.config("predictor"), "num_layers", None)
        if self.stages is not None or layers is None:
            return {"pp": (self.ranks,)}
        usable = range(2, layers // self.per_rank + 1)
        wanted = self.microbatches
        return {"pp": [n for n in usable if wanted is None or self.fits(wanted, n)]}

    def notes(self, spec: Spec, mesh: Degrees | None) -> Iterable[str]:
        """Yield that one microbatch keeps one rank busy at a time."""
        if self.parts(spec.loader.batch) == 1:
            why = "microbatches: 1" if self.microbatches == 1 else f"loader.batch {spec.loader.batch}"
            yield (
                f"pp: one microbatch ({why}), so that one rank of {self.ranks} works at a time. More rows in "
                f"a batch go through in more of them; {self.ranks} or more keep all ranks busy"
            )

    def counts(self, layers: int) -> list[int]:
        """Return the blocks of each stage, in the order of the model; stages go round the ranks."""
        if self.stages is not None:
            rows = [counts if isinstance(counts, tuple) else (counts,) for counts in self.stages]
            return [row[turn] for turn in range(self.per_rank) for row in rows]
        number = self.ranks * self.per_rank
        return [layers * (i + 1) // number - layers * i // number for i in range(number)]

    def most(self, layers: int) -> int:
        """Return the blocks of the rank that has most."""
        counts = self.counts(layers)
        return max(sum(counts[rank :: self.ranks]) for rank in range(self.ranks))

    def bounds(self, layers: int) -> list[tuple[int, int]]:
        """Return the first block of each stage, and the one behind its last."""
        ends = list(accumulate(self.counts(layers)))
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def parts(self, rows: int) -> int:
        """Return the microbatches of a batch: as asked for, but no more than rows, nor than fit in rounds."""
        wanted = min(self.microbatches or rows, rows)
        return next(count for count in range(wanted, 0, -1) if self.fits(count))

    def fits(self, microbatches: int, ranks: int | None = None) -> bool:
        """Tell whether the schedule can take so many microbatches. ranks: other than its own."""
        rounds = max(1, microbatches // (ranks or self.ranks))
        return self.schedule not in IN_ROUNDS or microbatches % rounds == 0

    def check(self, spec: Spec) -> Iterable[Problem]:
        if self.ranks == 1:
            yield Problem("size", "has no effect with 1 rank. Use 2 or more, or leave pp out.")
        task = spec.choices["task"]
        if task.config.trains != "predictor":
            yield Problem(
                "", f"cuts the training step of a predictor, which task {task.name!r} has not. Remove it."
            )
        if getattr(task.config, "validation", None) is not None:
            yield Problem(
                "",
                "has no rank that can call the whole predictor, which task.validation does. Use zero3, tp or "
                "cp, or leave validation out and run `task: {use: evaluate}` on checkpoints.",
            )
        layers = getattr(spec.config("predictor"), "num_layers", None)
        if layers is not None:
            yield from self._check_layers(layers)
        if self.microbatches is not None:
            yield from self._check_microbatches(self.microbatches, spec.loader.batch)
        if self.schedule == "zero-bubble":
            yield from self._check_split(choice.name for choice in spec.parallel)

    def _check_layers(self, layers: int) -> Iterable[Problem]:
        counts = self.counts(layers)
        if self.stages is not None and sum(counts) != layers:
            yield Problem(
                "stages",
                f"lists {' + '.join(map(str, counts))} = {sum(counts)} blocks; the predictor has {layers}. "
                f"{'Add' if sum(counts) < layers else 'Take away'} {abs(layers - sum(counts))}.",
            )
        elif len(counts) > layers:
            most = layers // self.per_rank
            remedy = f"Use at most {most} ranks." if most > 1 else "Use fewer stages on a rank, or no pp."
            yield Problem(
                "size",
                f"{self.ranks} ranks x {self.per_rank} = {len(counts)} stages, which {layers} blocks do not "
                f"fill. {remedy}",
            )

    def _check_split(self, names: Iterable[str]) -> Iterable[Problem]:
        """A split pass reads what a block has kept twice, and once more for each group of its weights."""
        for name in names:
            if name in ("recompute", "compile"):
                yield Problem(
                    "schedule",
                    f"'zero-bubble' goes back through a block in pieces; with {name!r} each of them would "
                    f"cost a whole pass. Use interleaved, or leave {name} out.",
                )

    def _check_microbatches(self, wanted: int, batch: int) -> Iterable[Problem]:
        if wanted > batch:
            yield Problem(
                "microbatches",
                f"{wanted} parts of {batch} rows leave some empty. Set loader.batch to {wanted} or more, or "
                f"microbatches to {batch} or less.",
            )
        elif not self.fits(wanted):
            yield Problem(
                "microbatches",
                f"schedule {self.schedule!r} takes {wanted} of them over {self.ranks} ranks in "
                f"{wanted // self.ranks} rounds, which do not divide them. Use {self.parts(wanted)}.",
            )


def components() -> Iterable[Component]:
    """Yield the strategy."""
    yield Component(
        "strategy",
        "pp",
        PipelineConfig,
        "cvx_plugins.parallel.pp:build",
        summary="consecutive blocks on different ranks",
    )
