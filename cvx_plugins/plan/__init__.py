"""The `plan` task: what a training recipe takes on any number of ranks, without running it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cvx_core import Component, Problem, hookimpl
from cvx_core.config import Positive
from cvx_core.run_config import TaskConfig
from cvx_core.spec import Spec

PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class PlanConfig(TaskConfig):
    """What training a predictor takes: memory by rank and stage, exchange, time. Reads what it reads."""

    needs: ClassVar = ("predictor",)
    optional: ClassVar = (
        "adapter",
        "text_encoder",
        "autoencoder",
        "scheduler",
        "dataset",
        "reader",
        "optimizer",
        "loader",
    )
    trains: ClassVar = "predictor"
    from_features: ClassVar = True
    buckets: ClassVar = True

    of: Literal["train"] = "train"
    """The task that is planned."""
    world: Positive = 1
    """Ranks that it would run on."""
    accumulate: Positive = 1
    """Batches per optimizer step."""
    ema: bool = False
    """Keep a running average of what is trained, as `task.ema` of training does."""
    memory_gb: PositiveFloat | None = None
    """Memory of a device, in 1e9 bytes. Where a rank needs more, changes to the recipe that make it fit are
    looked for."""
    flops: PositiveFloat | None = None
    """What a device computes with large matrices, in 1e12 operations a second, measured rather than promised;
    null: no times."""
    bandwidth_gb: PositiveFloat = 25.0
    """What a rank sends while it receives as much, in 1e9 bytes a second, over the slowest link it uses."""

    @property
    def ranks(self) -> int:
        return self.world

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield why the predictor's blocks are not known."""
        config = spec.config("predictor")
        if config is not None and getattr(config, "plan", None) is None:
            name = spec.name_of("predictor")
            yield Problem("", f"predictor {name!r} does not say what its blocks are (`plan()`). Add that.")


@hookimpl
def cvx_components() -> Iterable[Component]:
    yield Component(
        "task",
        "plan",
        PlanConfig,
        "cvx_plugins.plan.task:PlanTask",
        summary="memory, exchange and time of training on any number of ranks, without running it",
    )
