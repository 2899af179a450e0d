"""interleave: several batches are encoded ahead, then the encoders leave the device. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar

from pydantic import Field

from cvx_core import Component, Problem
from cvx_core.spec import Spec
from cvx_core.strategy import Stage, StrategyConfig
from cvx_plugins.parallel.encoder_dp_config import unfed


class InterleaveConfig(StrategyConfig):
    """Encode several batches, train on them, and so on; in between the encoders make room."""

    stage: ClassVar[Stage] = Stage.FEED

    rounds: Annotated[int, Field(ge=2)] = 10
    """Batches that are encoded ahead; moving the encoders costs less the more they are."""
    offload: bool = True
    """Move text encoder and autoencoder to the host while the predictor trains."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        yield from unfed(spec)
        if spec.config("task").trains is None:
            yield Problem("", f"task {spec.name_of('task')!r} trains nothing. Remove this strategy.")


def components() -> Iterable[Component]:
    """Yield the strategy."""
    yield Component(
        "strategy",
        "interleave",
        InterleaveConfig,
        "cvx_plugins.parallel.interleave:Interleave",
        summary="batches encoded ahead, encoders moved to the host in between",
    )
