"""Sampling times, and the noise levels around each step. A level is alpha = sqrt(alpha_bar)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from cvx_core import CvxError
from cvx_plugins.schedulers.noise import noise_schedule, sat_table, unscaled_alpha_bar
from cvx_plugins.schedulers.scheduler_config import TRAIN_STEPS, SchedulerConfig


class Levels(NamedTuple):
    """The levels of one step, float64 scalars.

    before: where the step before started, None at the first; now, after: where this one starts and ends;
    denoise: where the prediction is turned into a clean latent; last: the step ends at the clean latent.
    """

    before: Tensor | None
    now: Tensor
    after: Tensor
    denoise: Tensor
    last: bool


class Sampling(Protocol):
    """Where a sampler evaluates the predictor, and at which levels."""

    def timesteps(self, steps: int) -> list[int]: ...
    def around(self, index: int, timesteps: Sequence[int]) -> Levels: ...


@dataclass(frozen=True)
class DiffusersSampling:
    """One table for training and sampling.

    A step ends 1000 // steps timesteps lower, which is the next sampled timestep only where the number of
    steps divides 1000. Below timestep 0 lies the clean latent.
    """

    alpha_bar: Tensor
    spacing: Literal["trailing", "linspace", "leading"]

    def timesteps(self, steps: int) -> list[int]:
        """Return descending timesteps; halves are rounded to even. Source: Lin et al. 2024, table 2."""
        _check_steps(steps)
        if self.spacing == "leading":
            return [k * (TRAIN_STEPS // steps) for k in reversed(range(steps))]
        if self.spacing == "linspace":
            stride = (TRAIN_STEPS - 1) / max(steps - 1, 1)
            return [round(k * stride) for k in reversed(range(steps))]
        stride = (
            TRAIN_STEPS - TRAIN_STEPS / steps
        ) - TRAIN_STEPS  # the rounding of numpy.arange, which decides ties
        return [round(TRAIN_STEPS + k * stride) - 1 for k in range(steps)]

    def around(self, index: int, timesteps: Sequence[int]) -> Levels:
        """Return the levels of the step that starts at timesteps[index]."""
        after = timesteps[index] - TRAIN_STEPS // len(timesteps)
        now = self.alpha_bar[timesteps[index]].sqrt()
        return Levels(
            before=self.alpha_bar[timesteps[index - 1]].sqrt() if index else None,
            now=now,
            after=self.alpha_bar[after].sqrt() if after >= 0 else torch.ones_like(now),
            denoise=now,
            last=after < 0,
        )


@dataclass(frozen=True)
class SatSampling:
    """A table of the sampled timesteps alone, so that the terminal rescaling depends on their number.

    The prediction is read at the nearest level of the training table.
    alpha_bar: (1000,) float64 before rescaling; table: (1000,) levels of training.
    """

    alpha_bar: Tensor
    table: Tensor

    def timesteps(self, steps: int) -> list[int]:
        """Return descending timesteps from 999, evenly spaced and rounded down."""
        _check_steps(steps, fewest=2)  # rescaling needs a first and a last entry
        top = TRAIN_STEPS - 1
        return [int(k * (-top / steps) + top) for k in range(steps)]  # the rounding of numpy.linspace

    def sampled_table(self, timesteps: Sequence[int]) -> Tensor:
        """Return the levels (len(timesteps) + 1,) of a run, the clean latent's 1 at the end."""
        ascending = sat_table(self.alpha_bar[torch.tensor(timesteps[::-1], device="cpu")])
        return torch.cat([ascending.flip(0), torch.ones(1, dtype=torch.float64, device="cpu")])

    def snap(self, level: Tensor) -> int:
        """Return the training timestep whose level is nearest."""
        return int((self.table - level).abs().argmin())

    def around(self, index: int, timesteps: Sequence[int]) -> Levels:
        """Return the levels of the step that starts at timesteps[index]."""
        table = self.sampled_table(timesteps)
        return Levels(
            before=table[index - 1] if index else None,
            now=table[index],
            after=table[index + 1],
            denoise=self.table[self.snap(table[index])],
            last=index == len(timesteps) - 1,
        )


def sampling(cfg: SchedulerConfig) -> Sampling:
    """Make the sampling times and levels of a config."""
    if cfg.flavour == "sat":
        alpha_bar = unscaled_alpha_bar(cfg)
        return SatSampling(alpha_bar, sat_table(alpha_bar))
    return DiffusersSampling(noise_schedule(cfg).alpha_bar, cfg.spacing)


def _check_steps(steps: int, fewest: int = 1) -> None:
    if not fewest <= steps <= TRAIN_STEPS:
        raise CvxError(f"cannot sample in {steps} steps with this scheduler; use {fewest} to {TRAIN_STEPS}.")
