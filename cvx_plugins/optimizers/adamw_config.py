"""Fields of AdamW. Free of torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cvx_core import Config
from cvx_plugins.optimizers.group_config import GroupConfig

NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class AdamWConfig(Config):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    lr: NonNegativeFloat = 1e-4
    """Peak learning rate; the task's schedule scales it."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the running mean and of the running square of a gradient."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegativeFloat = 1e-4
    """Fraction of a weight, times lr, that a step takes off."""
    decay_norms: bool = False
    """Also decay biases, norm weights and whatever else has fewer than two dimensions."""
    fused: Literal["auto"] | bool = "auto"
    """One kernel for all parameters; `auto` uses it on cuda and cpu, where it is fastest."""
    groups: tuple[GroupConfig, ...] = ()
    """Parameters with settings of their own, as `{match: "*.ff.*", lr: 1e-5}`; the first match counts."""
