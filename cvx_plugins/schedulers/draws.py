"""Random draws: training timesteps of a data rank, and Gaussian noise."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cvx_core import CvxError
from cvx_plugins.schedulers.scheduler_config import TRAIN_STEPS, SchedulerConfig

# The SAT trainer leaves worlds up to this size the whole range.
SAT_SMALL_WORLD = 8


class TimestepDraw(NamedTuple):
    """From which timesteps a data rank draws.

    interval: cut the range into slices of equal width, and the ranks into as many groups; groups: how many,
    None for the largest divisor of the world that divides 1000; small_world: worlds up to this size draw from
    the whole range.
    """

    interval: bool = False
    groups: int | None = None
    small_world: int = 0

    def limits(self, rank: int, world: int) -> tuple[int, int]:
        """Return the half-open range of a rank. Raises CvxError where groups do not fit the world."""
        if not 0 <= rank < world:
            raise CvxError(f"timestep draw: rank {rank} is not in a world of {world} data ranks")
        if not self.interval or world <= self.small_world:
            return 0, TRAIN_STEPS
        groups = self.groups or largest_groups(world)
        if world % groups:
            raise CvxError(
                f"scheduler.groups {groups} does not divide the {world} data ranks; use a divisor of both "
                f"{world} and {TRAIN_STEPS}, leave it out, or draw: uniform."
            )
        width = TRAIN_STEPS // groups
        low = rank // (world // groups) * width
        return low, low + width

    def __call__(self, count: int, generator: torch.Generator, rank: int, world: int) -> Tensor:
        """Return (count,) int64 timesteps on the CPU."""
        low, high = self.limits(rank, world)
        return torch.randint(low, high, (count,), generator=generator, device=generator.device).cpu()


def largest_groups(world: int) -> int:
    """Return the largest divisor of `world` that divides the number of training timesteps."""
    return max(n for n in range(1, world + 1) if world % n == 0 and TRAIN_STEPS % n == 0)


def timestep_draw(cfg: SchedulerConfig) -> TimestepDraw:
    """Make the draw of a config."""
    return TimestepDraw(cfg.draw == "interval", cfg.groups, SAT_SMALL_WORLD if cfg.flavour == "sat" else 0)


def frames_first_noise(latent: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return float32 Gaussian noise of a latent's shape (B,C,T,h,w) on its device.

    The numbers fill (B,T,C,h,w), the layout in which the reference samplers hold a latent, so that one seed
    gives one clip everywhere. They are drawn on the generator's device. Raises CvxError without a generator.
    """
    if generator is None:
        raise CvxError(
            "this sampler draws noise at every step: pass `generator`, or use the solver 'ode' or ddim."
        )
    batch, channels, frames, height, width = latent.shape
    shape = (batch, frames, channels, height, width)
    noise = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    return noise.to(latent.device).transpose(1, 2)


def offset_noise(noise: Tensor, offset: Tensor, level: float) -> Tensor:
    """Add to each sample's noise (B,...) a constant: level * offset, offset being (B,) unit Gaussian."""
    return noise + level * offset.view(-1, *[1] * (noise.ndim - 1))
