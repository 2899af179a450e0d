"""cfg-parallel: the two predictions of guidance on two ranks. No torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import ClassVar

from cvx_core import Component, Problem
from cvx_core.spec import Spec
from cvx_core.strategy import Stage, StrategyConfig


class CFGParallelConfig(StrategyConfig):
    """Two ranks sample a video together: one predicts without its condition, the other with it."""

    stage: ClassVar[Stage] = Stage.FEED

    def degrees(self) -> Mapping[str, int | None]:
        return {"cfg": 2}

    def limits(self, spec: Spec) -> Mapping[str, Container[int]]:
        return {"cfg": (2,)}

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield why there are no two predictions."""
        task, name = spec.config("task"), spec.name_of("task")
        if not hasattr(task, "is_guided"):
            yield Problem("", f"shares out guidance, which task {name!r} has not. Remove this strategy.")
        elif not task.is_guided:
            yield Problem(
                "",
                "shares out guidance, but task.guidance 1 asks for one prediction instead of 2. "
                "Remove this strategy, or set another scale.",
            )


def components() -> Iterable[Component]:
    """Yield the strategy."""
    yield Component(
        "strategy",
        "cfg-parallel",
        CFGParallelConfig,
        "cvx_plugins.parallel.cfg_parallel:CFGParallel",
        summary="the two predictions of guidance on two ranks (sampling)",
    )
