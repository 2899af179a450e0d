"""Fields of Prodigy. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from cvx_core.errors import Problem
from cvx_plugins.optimizers.shared_config import PARTS_OF_PARAMETERS, Beta, OptimizerConfig, PositiveFloat

if TYPE_CHECKING:
    from cvx_core.spec import Spec


class ProdigyConfig(OptimizerConfig):
    """Prodigy: Adam that finds its step size itself (Mishchenko & Defazio 2023)."""

    parted: ClassVar[str] = "finds one step size from sums over all parameters"
    parting: ClassVar[tuple[str, ...]] = (*PARTS_OF_PARAMETERS, "pp")

    lr: Annotated[float, Field(ge=0.01, le=100.0)] = 1.0
    """Factor on the step size that is found: 1, or near it. The task's schedule scales it."""
    weight_decay: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Fraction of a weight, times the step size, that a step takes off."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the running mean and of the running square of a gradient."""
    beta3: Beta | None = None
    """Decay of the sums that the step size is found from; null: the square root of the second of betas."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator, times the step size."""
    decouple: bool = True
    """Decay weights apart from the gradient; false: add the decay to the gradient."""
    bias_correction: bool = False
    """Correct the running means of the first steps, as Adam does."""
    safeguard_warmup: bool = False
    """Leave the warm-up's factor out of the sums, so that a slow warm-up does not raise the step size."""
    d0: PositiveFloat = 1e-6
    """First step size."""
    d_coef: PositiveFloat = 1.0
    """Factor on each estimate of the step size; the setting to tune."""
    growth_rate: Annotated[float, Field(gt=1.0, allow_inf_nan=False)] | None = None
    """Most factor by which the step size grows in one step; null: any."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield strategies that it does not go with, and groups with a learning rate of their own."""
        yield from super().check(spec)
        for number, group in enumerate(self.groups):
            if group.lr not in (None, self.lr):
                yield Problem(
                    f"groups.{number}.lr", "prodigy finds one step size for all parameters. Leave lr out."
                )
