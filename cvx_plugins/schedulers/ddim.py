"""The deterministic first-order sampler. Source: Song et al. 2021, equation 12 with eta 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cvx_plugins.schedulers.base import Schedule, shared_parts
from cvx_plugins.schedulers.scheduler_config import DDIMConfig


def update(latent: Tensor, x0: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """Move a latent from level `now` to `after`, keeping the noise it holds. Levels are scalars alpha."""
    keep = ((1.0 - after * after) / (1.0 - now * now)).sqrt()
    return keep.item() * latent + (after - now * keep).item() * x0


@dataclass(frozen=True)
class DDIM(Schedule):
    """Needs neither memory nor a generator."""

    def step(
        self,
        prediction: Tensor,
        index: int,
        timesteps: Sequence[int],
        latent: Tensor,
        memory: Any = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Any]:
        """Return the latent of the next level in float32, and None. Tensors are (B,C,T,h,w)."""
        levels = self.sampling.around(index, timesteps)
        x0 = self.denoised(prediction, latent, levels)
        return update(latent.float(), x0, levels.now, levels.after), None


def build(cfg: DDIMConfig, _deps: Any) -> DDIM:
    """Make the scheduler of a config."""
    return DDIM(*shared_parts(cfg))
