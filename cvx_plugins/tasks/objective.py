"""What a predictor is given and what it should return: timesteps and noise, the target, the error."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvx_core.interfaces import Condition, Features, Noised, Parts
from cvx_core.random import Draws


def prediction_loss(parts: Parts, features: Features, draws: Draws, timestep: Tensor | None = None) -> Tensor:
    """Return the mean squared error per row (B,), float32. Timesteps are drawn where none are given."""
    objective = Diffusion(parts.scheduler)
    dtype = next(parts.predictor.parameters()).dtype
    noisy, timestep, condition, target = objective.noised(features, draws, dtype, timestep)
    return objective.error(parts.predictor(noisy, timestep, condition), target)


def drawn_timesteps(scheduler: Any, draws: Draws) -> Tensor:
    """Return the timesteps (B,) int64 of a batch's rows."""
    drawn = (scheduler.draw(1, g, draws.rank, draws.world) for g in draws.each("timestep"))
    return torch.cat(list(drawn))


class Diffusion:
    """The objective: the scheduler's target, squared error in float32."""

    def __init__(self, scheduler: Any, accumulate: int = 1):
        self.accumulate = accumulate
        self._scheduler = scheduler

    def noised(
        self, features: Features, draws: Draws, dtype: torch.dtype, timestep: Tensor | None = None
    ) -> Noised:
        """Return what the predictor is given, in `dtype`, and its target. Every row has draws of its own."""
        latent = features.latent
        if timestep is None:
            timestep = drawn_timesteps(self._scheduler, draws)
        timestep = timestep.to(latent.device)
        noise = draws.normal("noise", latent.shape[1:]).to(latent.device)
        schedule = self._scheduler.noise
        noisy = schedule.add_noise(latent.float(), noise, timestep)
        target = schedule.target(latent.float(), noise, timestep)
        condition = Condition(
            features.text_embeds.to(dtype),
            features.text_mask,
            features.image_latent.to(dtype) if features.image_latent is not None else None,
        )
        return Noised(noisy.to(dtype), timestep, condition, target)

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared error per row (B,), at least in float32."""
        wide = torch.promote_types(prediction.dtype, torch.float32)
        return F.mse_loss(prediction.to(wide), target.to(wide), reduction="none").flatten(1).mean(1)
