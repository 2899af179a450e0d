"""What the schedulers share: everything but the update of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cvx_plugins.schedulers.draws import TimestepDraw, timestep_draw
from cvx_plugins.schedulers.levels import Levels, Sampling, sampling
from cvx_plugins.schedulers.noise import NoiseSchedule, noise_schedule, to_x0
from cvx_plugins.schedulers.scheduler_config import SchedulerConfig


@dataclass(frozen=True)
class Schedule:
    """An immutable noise schedule with a training draw and sampling times. Samplers add `step`."""

    noise: NoiseSchedule
    sampling: Sampling
    timestep_draw: TimestepDraw
    guidance_exponent: int

    def draw(self, count: int, generator: torch.Generator, rank: int = 0, world: int = 1) -> Tensor:
        """Return training timesteps (count,) int64 on the CPU.

        Raises CvxError where world and groups disagree.
        """
        return self.timestep_draw(count, generator, rank, world)

    def timesteps(self, steps: int) -> list[int]:
        """Return the sampling timesteps, descending. Raises CvxError for a number out of range."""
        return self.sampling.timesteps(steps)

    def guidance(self, scale: float, index: int, timesteps: Sequence[int]) -> float:
        """Return 1 + scale (1 - cos(pi ((N - t) / N)^exponent)) / 2, N steps, t the training timestep.

        (N - t) / N runs far below zero at first, so the weight oscillates over the steps, as it does in both
        references.
        """
        steps = len(timesteps)
        phase = ((steps - timesteps[index]) / steps) ** self.guidance_exponent
        return 1.0 + scale * (1.0 - math.cos(math.pi * phase)) / 2.0

    def denoised(self, prediction: Tensor, latent: Tensor, levels: Levels) -> Tensor:
        """Return the clean latent, float32, that the prediction implies at a step."""
        alpha = levels.denoise
        return to_x0(
            self.noise.prediction, prediction, latent, alpha.item(), (1.0 - alpha * alpha).sqrt().item()
        )


def shared_parts(cfg: SchedulerConfig) -> tuple[NoiseSchedule, Sampling, TimestepDraw, int]:
    """Return the fields of Schedule for a config."""
    return noise_schedule(cfg), sampling(cfg), timestep_draw(cfg), cfg.guidance_exponent
