"""What every scheduler must satisfy, whatever its formulas."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from cvx_core.registry import Registry
from cvx_core.testing import Suite

SHAPE = (2, 3, 4, 5, 6)  # B, C, T, h, w
STEPS = (2, 5, 10, 50)  # divide 1000, so that every convention ends at the clean latent
ANY_STEPS = (*STEPS, 3, 7, 48, 61, 999, 1000)


def suite(name: str, **fields: Any) -> Suite:
    """Return the checks of scheduler `name`, made with `fields` on top of its preset."""

    def made() -> Any:
        component = Registry.discover().get("scheduler", name)
        assert component.config is not None
        return component.load()(component.config(**{**component.preset, **fields}), None)

    def alpha_bar_falls_and_is_float64() -> None:
        alpha_bar = made().noise.alpha_bar
        assert (alpha_bar.shape, alpha_bar.dtype) == ((1000,), torch.float64)
        assert bool((alpha_bar.diff() < 0).all())
        assert bool((alpha_bar >= 0).all())
        assert float(alpha_bar[0]) < 1

    def terminal_snr_is_zero_where_promised() -> None:
        config = Registry.discover().get("scheduler", name).config
        assert config is not None
        if getattr(config(**fields), "zero_snr", True):
            assert made().noise.alpha_bar[-1] == 0
            latent, noise = _pair()
            pure = made().noise.add_noise(latent, noise, torch.tensor([999, 999]))
            torch.testing.assert_close(pure, noise, rtol=0, atol=0)

    def noisy_latent_keeps_unit_variance() -> None:
        noise = made().noise
        for t in (0, 500, 999):
            level = torch.full((2,), t)
            ones, zeros = torch.ones(SHAPE), torch.zeros(SHAPE)
            signal, sigma = noise.add_noise(ones, zeros, level), noise.add_noise(zeros, ones, level)
            torch.testing.assert_close(signal**2 + sigma**2, ones, rtol=0, atol=1e-6)
            expected = noise.alpha_bar[t].sqrt().float().expand(SHAPE)
            torch.testing.assert_close(signal, expected, rtol=0, atol=1e-6)

    def target_leads_back_to_the_latent() -> None:
        noise, (latent, gaussian) = made().noise, _pair()
        for t in (0, 1, 400, 900):
            level = torch.full((2,), t)
            noisy = noise.add_noise(latent, gaussian, level)
            x0 = noise.to_x0(noise.target(latent, gaussian, level), noisy, level)
            torch.testing.assert_close(x0, latent, rtol=0, atol=1e-5)

    def noise_maths_is_float32_per_sample() -> None:
        noise, (latent, gaussian) = made().noise, _pair()
        levels = torch.tensor([10, 700])
        low = (latent.bfloat16(), gaussian.bfloat16())
        for function in (noise.add_noise, noise.target, noise.to_x0):
            assert function(*low, levels).dtype == torch.float32
            both = function(latent, gaussian, levels)
            for index in range(2):
                one = slice(index, index + 1)
                alone = function(latent[one], gaussian[one], levels[one])
                torch.testing.assert_close(both[one], alone, rtol=0, atol=0)

    def timesteps_descend_within_range() -> None:
        scheduler = made()
        for steps in ANY_STEPS:
            timesteps = scheduler.timesteps(steps)
            assert len(timesteps) == steps, f"{steps} steps gave {len(timesteps)} timesteps"
            assert all(isinstance(t, int) and 0 <= t < 1000 for t in timesteps)
            assert all(a > b for a, b in itertools.pairwise(timesteps))

    def last_step_returns_the_clean_latent() -> None:
        scheduler = made()
        latent, prediction = _pair()
        for steps in STEPS:
            timesteps = scheduler.timesteps(steps)
            x0, _ = scheduler.step(prediction, steps - 1, timesteps, latent, None, _generator())
            # a sampler may read the prediction at a training level near that of its timestep, but at one
            near = range(max(timesteps[-1] - 60, 0), min(timesteps[-1] + 60, 999) + 1)
            implied = [scheduler.noise.to_x0(prediction, latent, torch.full((2,), t)) for t in near]
            assert min(float((x0 - candidate).abs().max()) for candidate in implied) < 1e-5

    def every_step_lands_on_the_next_noise_level() -> None:
        scheduler = made()
        latent = torch.ones(1, 4, 8, 16, 16)
        for steps in (10, 50):
            timesteps = scheduler.timesteps(steps)
            generator, memory = _generator(), None
            gaussian = torch.randn(latent.shape, generator=generator)
            noisy = scheduler.noise.add_noise(latent, gaussian, torch.tensor(timesteps[:1]))
            for index, t in enumerate(timesteps):
                prediction = _implying(scheduler.noise, latent, noisy, t)
                noisy, memory = scheduler.step(prediction, index, timesteps, noisy, memory, generator)
                alpha_bar = scheduler.noise.alpha_bar[timesteps[index + 1]] if index + 1 < steps else 1.0
                assert abs(float(noisy.mean()) - alpha_bar**0.5) < 0.03, (
                    f"signal after step {index} of {steps}"
                )
                assert abs(float(noisy.std()) - (1 - alpha_bar) ** 0.5) < 0.03, (
                    f"noise after step {index} of {steps}"
                )

    def step_is_pure() -> None:
        scheduler = made()
        before = copy.deepcopy(scheduler)
        timesteps = scheduler.timesteps(5)
        latent, prediction = _pair()
        kept = (latent.clone(), prediction.clone())
        first, memory = scheduler.step(prediction, 0, timesteps, latent, None, _generator())
        once = scheduler.step(prediction, 1, timesteps, first, memory, _generator())[0]
        scheduler.step(prediction, 3, timesteps, latent, memory, _generator())  # leaves no trace
        again = scheduler.step(prediction, 1, timesteps, first, memory, _generator())[0]
        assert torch.equal(once, again)
        assert torch.equal(once, before.step(prediction, 1, timesteps, first, memory, _generator())[0])
        assert torch.equal(latent, kept[0])
        assert torch.equal(prediction, kept[1])

    def step_is_float32_for_half_precision() -> None:
        scheduler = made()
        timesteps = scheduler.timesteps(5)
        latent, prediction = _pair()
        half = scheduler.step(prediction.bfloat16(), 1, timesteps, latent.bfloat16(), None, _generator())[0]
        full = scheduler.step(
            prediction.bfloat16().float(), 1, timesteps, latent.bfloat16().float(), None, _generator()
        )[0]
        assert half.dtype == torch.float32
        assert torch.equal(half, full)
        assert half.shape == SHAPE

    def draw_is_seeded_and_in_range() -> None:
        scheduler = made()
        first, again = (scheduler.draw(64, _generator()) for _ in range(2))
        assert (first.shape, first.dtype, first.device.type) == ((64,), torch.int64, "cpu")
        assert torch.equal(first, again)
        assert not torch.equal(first, scheduler.draw(64, _generator(seed=1)))

    def ranks_together_cover_every_timestep() -> None:
        scheduler = made()
        for world in (1, 4):
            drawn = torch.cat(
                [scheduler.draw(20_000 // world, _generator(rank), rank, world) for rank in range(world)]
            )
            assert set(drawn.tolist()) == set(range(1000))

    def guidance_is_finite_and_bounded() -> None:
        scheduler = made()
        for steps in (2, 7, 50):
            timesteps = scheduler.timesteps(steps)
            weights = [scheduler.guidance(6.0, index, timesteps) for index in range(steps)]
            assert all(isinstance(weight, float) and math.isfinite(weight) for weight in weights)
            assert all(1.0 <= weight <= 7.0 for weight in weights)

    checks = [value for value in locals().values() if callable(value) and value is not made]
    return Suite.of(name, *checks)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _pair() -> tuple[Tensor, Tensor]:
    """Return two unit Gaussians of SHAPE."""
    latent, other = torch.randn(2, *SHAPE, generator=_generator(7))
    return latent, other


def _implying(noise: Any, latent: Tensor, noisy: Tensor, t: int) -> Tensor:
    """Return the prediction at timestep t that implies `latent`. to_x0 is affine: two probes tell."""
    level = torch.full((len(latent),), t)
    zero = noise.to_x0(torch.zeros_like(noisy), noisy, level)
    slope = noise.to_x0(torch.ones_like(noisy), noisy, level) - zero
    return (latent - zero) / slope
