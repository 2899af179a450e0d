"""Fields of `cp`. Free of torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from cvx_core import Component
from cvx_core.degrees import SEVERAL
from cvx_core.errors import Problem
from cvx_core.strategy import Ranks, Stage, StrategyConfig

if TYPE_CHECKING:
    from cvx_core.spec import Spec


class ContextConfig(StrategyConfig):
    """Context parallel: ranks share out the video tokens of one clip. Text is on every rank."""

    stage: ClassVar[Stage] = Stage.CONTEXT
    fields: ClassVar[Mapping[str, tuple[str, ...]]] = {"ring": ("ring",), "ulysses": ("ulysses",)}
    also_called: ClassVar[Mapping[str, str]] = {
        "ulysses": "`{use: cp, ulysses: 2}`",
        "ring": "`{use: cp, ring: 2}`",
        "usp": "`{use: cp, ulysses: 2, ring: 2}`",
    }

    ulysses: Ranks = 1
    """Ranks that share out the heads in attention (two all-to-all per block). Any number of heads goes; where
    it does not divide, some ranks have one more. Best within a machine.
    """
    ring: Ranks = 1
    """Ranks that pass keys and values round in attention. Heads set no limit; best between machines. With
    both, there are ring x ulysses ranks.
    """

    def degrees(self) -> Mapping[str, int | None]:
        return {"ring": self.ring, "ulysses": self.ulysses}

    def limits(self, spec: Spec) -> Mapping[str, Container[int]]:
        """Return 2 or more of both together."""
        return {"cp": SEVERAL}

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield that nothing is shared out, or that there is nothing that could be."""
        if self.ulysses * self.ring == 1:
            yield Problem(
                "",
                "ulysses 1 x ring 1 shares out nothing. Set one of them to 2 or more, or leave it out.",
            )
        if "predictor" not in spec.choices:
            yield Problem(
                "",
                f"shares out a predictor's tokens, but task {spec.name_of('task')!r} has none. Leave it out.",
            )
        elif not spec.config("predictor").plan().attend:
            yield Problem(
                "",
                f"predictor {spec.name_of('predictor')!r} names no attention in its plan, so its tokens "
                "cannot be shared out. Leave it out.",
            )


def components() -> Iterable[Component]:
    """Yield the strategy."""
    yield Component(
        "strategy",
        "cp",
        ContextConfig,
        "cvx_plugins.parallel.cp:cp",
        summary="video tokens of one clip shared out: ulysses, ring or both",
    )
