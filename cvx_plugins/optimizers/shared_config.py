"""Fields that all optimizers have. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from cvx_core import Config
from cvx_core.errors import Problem
from cvx_plugins.optimizers.group_config import GroupConfig

if TYPE_CHECKING:
    from cvx_core.spec import Spec

NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
PARTS_OF_PARAMETERS = ("zero1", "zero2", "zero3", "layerzero", "tp")
"""Strategies under which an optimizer sees parts of parameters."""

OF_ONE_PROCESS = ("recompute", "compile")
"""Strategies that one process can use alone."""


class OptimizerConfig(Config):
    """What an optimizer has besides its formula: groups, the precision of weights, and where state lies."""

    parted: ClassVar[str] = ""
    """Why the formula needs whole parameters, "" where it does not."""
    parting: ClassVar[tuple[str, ...]] = PARTS_OF_PARAMETERS
    """Strategies that it does not go with then."""

    lr: NonNegativeFloat = 1e-4
    """Peak learning rate; the task's schedule scales it."""
    weight_decay: NonNegativeFloat = 1e-4
    """Fraction of a weight, times lr, that a step takes off."""
    decay_norms: bool = False
    """Also decay biases, norm weights and whatever else has fewer than two dimensions."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How a new bfloat16 weight is rounded. `stochastic`: up or down at random, by how near either is, so
    that updates too small to show arrive in the mean; the same in a repeated or resumed run.
    """
    master_weights: Literal["float32"] | None = None
    """`float32`: keep half-precision weights in float32 too, and round them for the model; 4 bytes each."""
    offload: bool | Literal["state"] = False
    """`state`: keep optimizer state and master weights in host memory, and compute the update there. true:
    gradients too, each from the moment it is computed; for a single process.
    """
    groups: tuple[GroupConfig, ...] = ()
    """Parameters with settings of their own, as `{match: "*.ff.*", lr: 1e-5}`; the first match counts."""

    @model_validator(mode="after")
    def _one_remedy(self) -> OptimizerConfig:
        if self.rounding == "stochastic" and self.master_weights is not None:
            raise ValueError(
                "rounding: stochastic does nothing beside master_weights, which lose no update. Remove one."
            )
        return self

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield strategies and precisions that the settings do not go with."""
        name = spec.name_of("optimizer")
        used = [choice.name for choice in spec.parallel if choice.name in PARTS_OF_PARAMETERS]
        parting = [repr(choice.name) for choice in spec.parallel if choice.name in self.parting]
        if parting and self.parted:
            verb = "shares" if len(parting) == 1 else "share"
            others = "ddp and cp" if "pp" in self.parting else "ddp, cp and pp"
            yield Problem(
                "use",
                f"{name!r} {self.parted}, and {' and '.join(parting)} {verb} parameters out. Use adamw or "
                f"adamw-8bit, or only {others}.",
            )
        if used and self.offload:
            yield Problem(
                "offload",
                f"needs state that is kept whole, and {used[0]!r} shares it out. Leave out one of them.",
            )
        several = [choice.name for choice in spec.parallel if choice.name not in OF_ONE_PROCESS]
        if several and not used and self.offload is True:
            yield Problem(
                "offload",
                f"takes gradients away before {several[0]!r} can exchange them. Use offload: state.",
            )
        if spec.run.dtype == "float32" and (self.rounding, self.master_weights) != ("nearest", None):
            field = "rounding" if self.rounding != "nearest" else "master_weights"
            yield Problem(
                field, "does nothing, since weights are float32. Remove it, or set dtype: bfloat16."
            )
        if spec.run.dtype == "float16" and self.rounding != "nearest":
            yield Problem("rounding", "is for bfloat16, and dtype is float16. Use master_weights: float32.")
