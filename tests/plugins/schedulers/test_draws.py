"""Training timesteps of data ranks, and noise."""

from typing import Any

import pytest
import torch

from cvx_core import CvxError, Registry
from cvx_plugins.schedulers.draws import TimestepDraw, frames_first_noise, offset_noise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scheduler(use: str = "ddim", **fields: Any) -> Any:
    component = Registry.discover().get("scheduler", use)
    return component.load()(component.config(**fields), None)


def test_interval_ranks_stay_in_their_own_slice() -> None:
    made = scheduler(draw="interval")
    for rank in range(8):
        drawn = made.draw(500, generator(rank), rank, 8)
        assert rank * 125 <= int(drawn.min())
        assert int(drawn.max()) < (rank + 1) * 125


def test_uniform_ranks_use_the_whole_range() -> None:
    drawn = scheduler(draw="uniform").draw(5000, generator(), rank=7, world=8)
    assert (int(drawn.min()), int(drawn.max())) == (0, 999)


def test_sat_flavour_leaves_small_worlds_the_whole_range() -> None:
    draw = scheduler(flavour="sat", draw="interval", groups=40).timestep_draw
    assert draw.limits(7, 8) == (0, 1000)
    assert draw.limits(39, 40) == (975, 1000)


def test_groups_that_do_not_divide_the_ranks_are_an_error() -> None:
    made = scheduler(draw="interval", groups=4)
    with pytest.raises(CvxError, match="does not divide the 6 data ranks"):
        made.draw(1, generator(), rank=0, world=6)


def test_rank_outside_the_world_is_an_error() -> None:
    with pytest.raises(CvxError, match="rank 4"):
        TimestepDraw().limits(4, 4)


def test_noise_is_drawn_frames_first() -> None:
    latent = torch.zeros(2, 3, 4, 5, 6)
    expected = torch.randn(2, 4, 3, 5, 6, generator=generator()).transpose(1, 2)
    assert torch.equal(frames_first_noise(latent, generator()), expected)


def test_stochastic_solver_without_generator_is_an_error() -> None:
    made = scheduler("dpm")
    latent = torch.zeros(1, 3, 4, 5, 6)
    with pytest.raises(CvxError, match="generator"):
        made.step(latent, 0, made.timesteps(5), latent, None, None)


def test_steps_out_of_range_are_an_error() -> None:
    for flavour, steps in (("diffusers", 0), ("diffusers", 1001), ("sat", 1)):
        with pytest.raises(CvxError, match=f"{steps} steps"):
            scheduler(flavour=flavour).timesteps(steps)


def test_offset_is_constant_in_a_sample() -> None:
    noise = torch.randn(2, 3, 4, 5, 6, generator=generator())
    shifted = offset_noise(noise, torch.tensor([1.0, -2.0]), 0.1)
    difference = (shifted - noise).flatten(1)
    torch.testing.assert_close(difference, torch.tensor([[0.1], [-0.2]]).expand(-1, 360), rtol=0, atol=1e-6)
