"""DPM-Solver++ (2M), stochastic and deterministic. Source: Lu et al. 2022, algorithm 2, and its SDE form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cvx_plugins.schedulers.base import Schedule, shared_parts
from cvx_plugins.schedulers.draws import frames_first_noise
from cvx_plugins.schedulers.levels import Levels
from cvx_plugins.schedulers.scheduler_config import DPMConfig


class Weights(NamedTuple):
    """A step is latent * x + x0 * D + noise * e, with D = x0 + correction * (x0 - x0 of the step before)."""

    latent: float
    x0: float
    noise: float
    correction: float


def log_snr(alpha: Tensor) -> Tensor:
    """Return log(alpha / sigma): -inf for pure noise, +inf for a clean latent."""
    return (alpha / (1.0 - alpha * alpha).sqrt()).log()


def weights(solver: Literal["sde", "ode"], levels: Levels) -> Weights:
    """Return the weights of a step.

    An infinite `log_snr` gives the right limits: where a step starts from pure noise, the latent's weight in
    an SDE step and the correction of the next step vanish. The last step leaves x0 alone.
    """
    _, now, after, _, last = levels
    if last:
        return Weights(0.0, 1.0, 0.0, 0.0)
    h = log_snr(after) - log_snr(now)
    ratio = ((1.0 - after * after) / (1.0 - now * now)).sqrt()
    ratio_h, order = (ratio * (-h).exp(), 2.0) if solver == "sde" else (ratio, 1.0)
    noise = (
        (1.0 - after * after).sqrt() * (-(-2.0 * h).expm1()).sqrt()
        if solver == "sde"
        else torch.zeros_like(h)
    )
    correction = 0.0 if levels.before is None else (h / (log_snr(now) - log_snr(levels.before)) / 2.0).item()
    return Weights(ratio_h.item(), (-(-order * h).expm1() * after).item(), noise.item(), correction)


def update(latent: Tensor, x0: Tensor, x0_before: Tensor | None, noise: Tensor | None, by: Weights) -> Tensor:
    """Combine the parts of a step, all float32 (B,C,T,h,w). Without x0_before it is first order."""
    direction = x0 if x0_before is None or not by.correction else x0 + by.correction * (x0 - x0_before)
    moved = by.latent * latent + by.x0 * direction
    return moved if noise is None else moved + by.noise * noise


@dataclass(frozen=True)
class DPM(Schedule):
    """Remembers the clean latent of the step before. The stochastic solver needs a generator.

    draws_at_last: draw noise at the last step too, and leave it unused, as the diffusers scheduler does.
    gaussian: returns the noise of a latent's shape from a generator.
    """

    solver: Literal["sde", "ode"] = "sde"
    draws_at_last: bool = True
    gaussian: Callable[[Tensor, torch.Generator | None], Tensor] = frames_first_noise

    def step(
        self,
        prediction: Tensor,
        index: int,
        timesteps: Sequence[int],
        latent: Tensor,
        memory: Any = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Any]:
        """Return the latent of the next level and the clean latent, float32 (B,C,T,h,w).

        Raises CvxError where the solver needs a generator and gets none.
        """
        levels = self.sampling.around(index, timesteps)
        x0 = self.denoised(prediction, latent, levels)
        second_order = memory is not None and not levels.last
        noise = self.draw_noise(latent, second_order, levels.last, generator)
        by = weights(self.solver, levels)
        return update(latent.float(), x0, memory if second_order else None, noise, by), x0

    def draw_noise(
        self, latent: Tensor, second_order: bool, last: bool, generator: torch.Generator | None
    ) -> Tensor | None:
        """Return the noise of a step, or None. A second-order step draws twice and uses the second, so that a
        generator shared with the references stays in step with them.
        """
        if self.solver == "ode" or (last and not self.draws_at_last):
            return None
        noise = self.gaussian(latent, generator)
        return self.gaussian(latent, generator) if second_order else noise


def build(cfg: DPMConfig, _deps: Any) -> DPM:
    """Make the scheduler of a config."""
    return DPM(*shared_parts(cfg), solver=cfg.solver, draws_at_last=cfg.flavour == "diffusers")
