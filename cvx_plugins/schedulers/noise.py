"""The noise schedule: tables of alpha_bar, and the pure functions that mix latent and noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cvx_plugins.schedulers.scheduler_config import TRAIN_STEPS, SchedulerConfig


def scaled_linear(beta_start: float, beta_end: float) -> Tensor:
    """Return alpha_bar (1000,) float64 of betas with evenly spaced square roots (Rombach et al. 2022)."""
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, TRAIN_STEPS, dtype=torch.float64, device="cpu")
    return (1.0 - roots**2).cumprod(0)


def shift_snr(alpha_bar: Tensor, shift: float) -> Tensor:
    """Divide the signal-to-noise ratio alpha_bar / (1 - alpha_bar) by `shift`."""
    return alpha_bar / (shift + (1.0 - shift) * alpha_bar)


def zero_terminal(alpha: Tensor) -> Tensor:
    """Map sqrt(alpha_bar) affinely: its end to 0, its start to itself. Source: Lin et al. 2024, alg. 1."""
    first, last = alpha[0], alpha[-1]
    return (alpha - last) * (first / (first - last))


def single(values: Tensor) -> Tensor:
    """Round float64 values to what float32 can hold, where the reference keeps a table in float32."""
    return values.float().double()


@dataclass(frozen=True)
class NoiseSchedule:
    """How much signal and noise each training timestep holds: noisy = alpha latent + sigma noise.

    alpha_bar: (1000,) float64, index 0 nearly clean, 999 noisiest; alpha = sqrt(alpha_bar), sigma = sqrt(1 -
    alpha_bar). Latents are (B,C,T,h,w) of any float dtype, timesteps (B,) int64; results are float32.
    """

    alpha_bar: Tensor
    prediction: Literal["v", "epsilon"] = "v"

    def add_noise(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Return alpha * latent + sigma * noise."""
        alpha, sigma = self.levels(timestep, latent)
        return alpha * latent.float() + sigma * noise.float()

    def target(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Return what the predictor learns: the noise, or v = alpha * noise - sigma * latent.

        Source of v: Salimans & Ho 2022, appendix D.
        """
        if self.prediction == "epsilon":
            return noise.float()
        alpha, sigma = self.levels(timestep, latent)
        return alpha * noise.float() - sigma * latent.float()

    def to_x0(self, prediction: Tensor, noisy: Tensor, timestep: Tensor) -> Tensor:
        """Return the clean latent that a prediction implies."""
        return to_x0(self.prediction, prediction, noisy, *self.levels(timestep, noisy))

    def weighted_loss(
        self,
        prediction: Tensor,
        noisy: Tensor,
        latent: Tensor,
        timestep: Tensor,
        kind: Literal["l2", "l1"] = "l2",
        weight_cap: float | None = None,
    ) -> Tensor:
        """Return per sample (B,) the mean weighted error of the implied clean latent.

        The weight is 1 / sigma^2, times alpha^2 for epsilon, and at most `weight_cap` (Hang et al. 2023).
        Without a cap the l2 loss is the plain mean squared error between prediction and target. Source:
        Salimans & Ho 2022, section 4.
        """
        error = self.to_x0(prediction, noisy, timestep) - latent.float()
        error = error.square() if kind == "l2" else error.abs()
        weight = self.weight(timestep.to(latent.device))
        if weight_cap is not None:
            weight = weight.clamp(max=weight_cap)
        return weight * error.flatten(1).mean(1)

    def weight(self, timestep: Tensor) -> Tensor:
        """Return the loss weight (B,) float32 of an error in the clean latent."""
        alpha = self.alpha_bar.sqrt().float().to(timestep.device)[timestep]
        weight = 1.0 / (1.0 - alpha * alpha)  # in float32 like the reference, which matters near timestep 0
        return weight if self.prediction == "v" else weight * alpha * alpha

    def levels(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma as float32 (B,1,..) on the device of `like`."""
        alpha_bar = self.alpha_bar[timestep.to(self.alpha_bar.device)].view(-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt().to(like.device, torch.float32), (1.0 - alpha_bar).sqrt().to(
            like.device, torch.float32
        )


def to_x0(
    kind: Literal["v", "epsilon"],
    prediction: Tensor,
    noisy: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
) -> Tensor:
    """Return the clean latent in float32: alpha x - sigma v, or (x - sigma epsilon) / alpha."""
    prediction, noisy = prediction.float(), noisy.float()
    if kind == "v":
        return alpha * noisy - sigma * prediction
    return (noisy - sigma * prediction) / alpha


def unscaled_alpha_bar(cfg: SchedulerConfig) -> Tensor:
    """Return alpha_bar (1000,) float64 before the terminal SNR is made zero."""
    return shift_snr(scaled_linear(cfg.beta_start, cfg.beta_end), cfg.snr_shift)


def noise_schedule(cfg: SchedulerConfig) -> NoiseSchedule:
    """Make the schedule of a config; flavour 'sat' keeps its table of alpha in float32."""
    alpha_bar = unscaled_alpha_bar(cfg)
    if cfg.flavour == "sat":
        return NoiseSchedule(sat_table(alpha_bar).square(), cfg.prediction)
    if cfg.zero_snr:
        alpha_bar = zero_terminal(alpha_bar.sqrt()).square()
    return NoiseSchedule(alpha_bar, cfg.prediction)


def sat_table(alpha_bar: Tensor) -> Tensor:
    """Return alpha with zero terminal SNR, every step of the calculation rounded to float32, as float64."""
    root = single(single(alpha_bar).sqrt()).float()
    return zero_terminal(root).double()
