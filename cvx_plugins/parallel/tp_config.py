"""Config of tensor parallelism. No torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from cvx_core import Component
from cvx_core.errors import Problem
from cvx_core.strategy import Ranks, Stage, StrategyConfig

if TYPE_CHECKING:
    from cvx_core.spec import Spec


class TensorConfig(StrategyConfig):
    """Tensor parallel: the heads and hidden units of every block are shared out, inside each layer."""

    stage: ClassVar[Stage] = Stage.TENSOR
    fields: ClassVar[Mapping[str, tuple[str, ...]]] = {"size": ("tp",)}
    also_called: ClassVar[Mapping[str, str]] = {
        "sp": "`{use: tp, sequence: true}`",
        "sequence-parallel": "`{use: tp, sequence: true}`",
    }

    size: Ranks = 2
    """Ranks that share a layer; at most as many as the predictor has heads, which need not divide."""
    sequence: bool = False
    """Share out the video's tokens too between these layers, which divides the memory they take."""

    def degrees(self) -> Mapping[str, int | None]:
        return {"tp": self.size}

    def limits(self, spec: Spec) -> Mapping[str, Container[int]]:
        """Return up to as many as there are heads; a sequence is shared by 2 or more."""
        plan = getattr(spec.config("predictor"), "plan", None)
        least = 2 if self.sequence else 1
        return {"tp": range(least, plan().num_heads + 1)} if plan is not None else {}

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield what the predictor cannot be shared out by."""
        if spec.config("predictor") is None:
            yield Problem("", f"task {spec.name_of('task')!r} has no predictor to share out. Remove it.")
            return
        plan = getattr(spec.config("predictor"), "plan", None)
        if plan is None or not plan().column:
            yield Problem(
                "",
                f"predictor {spec.name_of('predictor')!r} names no column and row layers to share out. "
                "Use zero3 to share its memory.",
            )
        elif self.size > plan().num_heads:
            yield Problem(
                "size",
                f"tp {self.size} shares out the heads of predictor {spec.name_of('predictor')!r}, which has "
                f"{plan().num_heads}. Use a size of at most {plan().num_heads}.",
            )
        if self.sequence and self.size == 1:
            yield Problem("sequence", "has no effect with size 1. Remove it, or use a larger size.")


def components() -> Iterable[Component]:
    """Yield the strategy."""
    yield Component(
        "strategy",
        "tp",
        TensorConfig,
        "cvx_plugins.parallel.tp:build",
        summary="heads and hidden units shared out inside each layer; sequence: the video's tokens too",
    )
