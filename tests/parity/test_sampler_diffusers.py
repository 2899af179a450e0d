"""Sampling in flavour 'diffusers' against the schedulers of diffusers, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cvx_core import Registry

diffusers = pytest.importorskip("diffusers")

# As the released pipelines set them.
RELEASED = {
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "clip_sample": False,
}
DIVIDES = (1, 2, 4, 10, 50)
DOES_NOT_DIVIDE = (3, 7, 30, 48, 111)


def schedulers(use: str, **foreign: Any) -> tuple[Any, Any]:
    """Return diffusers' scheduler and ours, made from its saved config."""
    oracle_class = {"ddim": diffusers.CogVideoXDDIMScheduler, "dpm": diffusers.CogVideoXDPMScheduler}[use]
    oracle = oracle_class(**{**RELEASED, **foreign})
    component = Registry.discover().get("scheduler", use)
    fields = component.config.recognise({**oracle.config, "_class_name": oracle_class.__name__})
    assert fields.pop("use") == use
    return oracle, component.load()(component.config(**fields), None)


def network(latent: Tensor, timestep: int) -> Tensor:
    return 0.5 * latent.tanh() + 0.1 * timestep / 1000 + 0.2 * latent.cos()


def run_oracle(oracle: Any, steps: int, start: Tensor, seed: int) -> list[Tensor]:
    """Return the latents (B,T,C,h,w) after each step; called as the pipeline calls it."""
    oracle.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    latent, memory, latents = start, None, []
    for index, t in enumerate(oracle.timesteps):
        prediction = network(latent, int(t))
        if isinstance(oracle, diffusers.CogVideoXDPMScheduler):
            back = oracle.timesteps[index - 1] if index else None
            latent, memory = oracle.step(
                prediction, memory, t, back, latent, generator=generator, return_dict=False
            )
        else:
            latent = oracle.step(prediction, t, latent, generator=generator, return_dict=False)[0]
        latents.append(latent)
    return [*latents, torch.randn(3, generator=generator)]


def run_ours(made: Any, steps: int, start: Tensor, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latent, memory, latents = start.transpose(1, 2), None, []
    timesteps = made.timesteps(steps)
    for index, t in enumerate(timesteps):
        latent, memory = made.step(network(latent, t), index, timesteps, latent, memory, generator)
        latents.append(latent.transpose(1, 2))
    return [*latents, torch.randn(3, generator=generator)]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("use", ["ddim", "dpm"])
@pytest.mark.parametrize("steps", DIVIDES + DOES_NOT_DIVIDE)
def test_trajectory_and_state_of_the_generator_are_equal(use: str, steps: int, shift: float) -> None:
    oracle, made = schedulers(use, snr_shift_scale=shift)
    start = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(steps))
    reference, ours = run_oracle(oracle, steps, start, seed=3), run_ours(made, steps, start, seed=3)
    assert made.timesteps(steps) == oracle.timesteps.tolist()
    for index, (expected, got) in enumerate(zip(reference, ours, strict=True)):
        torch.testing.assert_close(
            got, expected, rtol=0, atol=1e-5, msg=lambda text, index=index: f"step {index}: {text}"
        )


@pytest.mark.parametrize("use", ["ddim", "dpm"])
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_other_spacings_and_epsilon_are_equal(use: str, spacing: str, prediction: str) -> None:
    oracle, made = schedulers(
        use, timestep_spacing=spacing, prediction_type=prediction, rescale_betas_zero_snr=False
    )
    start = torch.randn(1, 3, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    for steps in (10, 30):
        for expected, got in zip(
            run_oracle(oracle, steps, start, 5), run_ours(made, steps, start, 5), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
def test_timesteps_are_equal_for_every_number_of_steps(spacing: str) -> None:
    oracle, made = schedulers("ddim", timestep_spacing=spacing)
    off_by_one_step = []
    for steps in range(1, 1001):
        oracle.set_timesteps(steps)
        expected = oracle.timesteps.tolist()
        if len(expected) != steps:  # a rounding error makes diffusers append timestep -1
            assert (spacing, expected[-1]) == ("trailing", -1)
            off_by_one_step.append(steps)
            expected.pop()
        assert made.timesteps(steps) == expected, steps
    assert off_by_one_step[:1] == ([61] if spacing == "trailing" else [])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noisy_latent_and_target_are_equal(shift: float) -> None:
    oracle, made = schedulers("ddim", snr_shift_scale=shift)
    generator = torch.Generator().manual_seed(0)
    latent, noise = torch.randn(2, 6, 4, 3, 2, 2, generator=generator)
    timestep = torch.tensor([0, 1, 100, 500, 998, 999])
    noisy = made.noise.add_noise(latent, noise, timestep)
    torch.testing.assert_close(noisy, oracle.add_noise(latent, noise, timestep), rtol=0, atol=1e-6)
    velocity = oracle.get_velocity(latent, noise, timestep)
    torch.testing.assert_close(made.noise.target(latent, noise, timestep), velocity, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [10, 50])
def test_dynamic_guidance_follows_the_pipeline(steps: int) -> None:
    import math

    _, made = schedulers("dpm")
    timesteps = made.timesteps(steps)
    for index, t in enumerate(timesteps):
        expected = 1 + 6.0 * ((1 - math.cos(math.pi * ((steps - t) / steps) ** 5.0)) / 2)
        assert made.guidance(6.0, index, timesteps) == pytest.approx(expected, rel=1e-9)
