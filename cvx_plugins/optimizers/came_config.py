"""Fields of CAME. Free of torch."""

from __future__ import annotations

from typing import ClassVar

from cvx_plugins.optimizers.shared_config import Beta, OptimizerConfig, PositiveFloat


class CameConfig(OptimizerConfig):
    """CAME: squares of gradients kept as a row and a column, steps scaled by confidence (Luo et al. 2023)."""

    parted: ClassVar[str] = "takes means over the rows and columns of whole parameters"

    betas: tuple[Beta, Beta, Beta] = (0.9, 0.999, 0.9999)
    """Decay of the running update, of the running squares of gradients, and of those of the instability."""
    eps: tuple[PositiveFloat, PositiveFloat] = (1e-30, 1e-16)
    """Added to squares of gradients and to squares of the instability."""
    clip_threshold: PositiveFloat = 1.0
    """Most root mean square of a parameter's update, before lr."""
