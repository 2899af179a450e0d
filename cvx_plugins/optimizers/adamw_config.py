"""Fields of AdamW, with state in full and in 8 bits. Free of torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cvx_plugins.optimizers.shared_config import Beta, OptimizerConfig


class AdamConfig(OptimizerConfig):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the running mean and of the running square of a gradient."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the denominator."""


class AdamWConfig(AdamConfig):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    fused: Literal["auto"] | bool = "auto"
    """One kernel for all parameters; `auto` uses it on cuda and cpu, where it is fastest."""


class AdamW8bitConfig(AdamConfig):
    """AdamW whose two states take one byte each: a level of 256 times a scale (Dettmers et al. 2021)."""

    block: Literal[64, 128, 256] = 256
    """Values of one row that share a scale. Rows shorter than 64 values keep their state in full."""
