"""Noise, loss and timestep groups against the SAT trainer and its Megatron port."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cvx_core import Registry
from cvx_plugins.schedulers.draws import offset_noise
from cvx_plugins.schedulers.noise import sat_table, scaled_linear, shift_snr, single


def scheduler(**fields: Any) -> Any:
    component = Registry.discover().get("scheduler", "ddim")
    return component.load()(component.config(**fields), None)


@pytest.fixture(scope="module")
def stored(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "fixtures/sat/loss/loss.safetensors")


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "fixtures/megatron/golden/cogvideo_diffusion/diffusion.safetensors")


def cases(stored: dict[str, Tensor]) -> list[str]:
    return sorted(key.removesuffix(".noised") for key in stored if key.endswith(".noised"))


def parse(case: str) -> tuple[float, float, str]:
    """Return shift, offset level and kind of e.g. shift1.offset0.1.l2.t2v."""
    shift, rest = case.removeprefix("shift").split(".offset")
    level, kind, _ = rest.rsplit(".", 2)
    return float(shift), float(level), kind


def test_noisy_latents_and_losses_are_the_reference_ones(stored: dict[str, Tensor]) -> None:
    assert len(cases(stored)) >= 12
    for case in cases(stored):
        shift, level, kind = parse(case)
        schedule = scheduler(flavour="sat", snr_shift=shift).noise
        noise = offset_noise(stored["noise"], stored["offset_noise"], level)
        noisy = schedule.add_noise(stored["latent"], noise, stored["idx"])
        torch.testing.assert_close(noisy, stored[f"{case}.noised"], rtol=1e-5, atol=1e-6)
        loss = schedule.weighted_loss(stored[f"{case}.v_pred"], noisy, stored["latent"], stored["idx"], kind)
        torch.testing.assert_close(loss, stored[f"{case}.loss"], rtol=1e-5, atol=0)


def test_levels_and_weights_are_the_reference_ones(stored: dict[str, Tensor]) -> None:
    for shift in (1, 3):
        schedule = scheduler(flavour="sat", snr_shift=shift).noise
        alpha = schedule.alpha_bar.sqrt()[stored["idx"]].float()
        torch.testing.assert_close(
            schedule.weight(stored["idx"]), stored[f"shift{shift}.weight"].flatten(), rtol=1e-5, atol=0
        )
        if f"shift{shift}.alpha_sqrt" in stored:
            torch.testing.assert_close(
                alpha, stored[f"shift{shift}.alpha_sqrt"].flatten(), rtol=0, atol=1.2e-7
            )


def test_capped_weight_is_the_reference_one(stored: dict[str, Tensor]) -> None:
    schedule = scheduler(flavour="sat").noise
    keys = [key for key in stored if key.startswith("min_snr5.sample")]
    assert keys
    for key in keys:
        index = int(key.removeprefix("min_snr5.sample").removesuffix(".loss"))
        pick = slice(index, index + 1)
        latent, noise, timestep = (stored[name][pick] for name in ("latent", "noise", "idx"))
        noisy = schedule.add_noise(latent, noise, timestep)
        prediction = stored["shift1.offset0.l2.t2v.v_pred"][pick]
        loss = schedule.weighted_loss(prediction, noisy, latent, timestep, weight_cap=5.0)
        torch.testing.assert_close(loss, stored[key], rtol=1e-5, atol=0)


def test_reference_loss_is_the_mean_squared_error_on_v(stored: dict[str, Tensor]) -> None:
    for case in cases(stored):
        shift, level, kind = parse(case)
        if kind != "l2":
            continue
        noise = offset_noise(stored["noise"], stored["offset_noise"], level)
        target = scheduler(flavour="sat", snr_shift=shift).noise.target(
            stored["latent"], noise, stored["idx"]
        )
        error = (stored[f"{case}.v_pred"] - target).square().flatten(1).mean(1)
        torch.testing.assert_close(error, stored[f"{case}.loss"], rtol=1e-5, atol=0)


def test_ranks_draw_from_the_ranges_of_the_reference(shared: Path) -> None:
    config = json.loads((shared / "fixtures/sat/loss/config.json").read_text())
    assert config["timestep_ranges"]
    for key, ranges in config["timestep_ranges"].items():
        world, groups = (int(part.lstrip("worldgup")) for part in key.split("_"))
        draw = scheduler(flavour="sat", draw="interval", groups=groups or None).timestep_draw
        assert [list(draw.limits(rank, world)) for rank in range(world)] == ranges, key


def test_ranks_form_the_groups_of_the_megatron_port(shared: Path) -> None:
    folder = shared / "fixtures/megatron/golden/cogvideo_diffusion"
    groups = json.loads((folder / "diffusion.json").read_text())["uniform_groups_by_dp_size"]
    draw = scheduler(draw="interval").timestep_draw
    for world, expected in groups.items():
        limits = [draw.limits(rank, int(world)) for rank in range(int(world))]
        width, interval = expected["group_width"], expected["interval"]
        assert limits == [(r // width * interval, (r // width + 1) * interval) for r in range(int(world))], (
            world
        )


def test_tables_are_those_of_the_megatron_port(golden: dict[str, Tensor]) -> None:
    close = {"rtol": 0, "atol": 1.2e-7}
    for name, shift in {"a_table": 1.0, "a_table_shift3_pre": 3.0}.items():
        alpha = scheduler(flavour="sat", snr_shift=shift).noise.alpha_bar.sqrt().float()
        torch.testing.assert_close(alpha, golden[name], **close)
    sampling = scheduler(flavour="sat").sampling
    table = sampling.sampled_table(sampling.timesteps(50))[:-1].flip(0).float()
    torch.testing.assert_close(table, golden["a_table_50steps"], **close)
    rescaled = sat_table(scaled_linear(0.00085, 0.012))
    torch.testing.assert_close(
        single(shift_snr(rescaled**2, 3.0).sqrt()).float(), golden["a_table_post"], rtol=0, atol=1e-6
    )


def test_noisy_latents_and_losses_are_those_of_the_megatron_port(golden: dict[str, Tensor]) -> None:
    schedule = scheduler(flavour="sat").noise
    noisy = schedule.add_noise(golden["x0"], golden["noise"], golden["idx"])
    torch.testing.assert_close(noisy, golden["x_t"], rtol=0, atol=1e-6)
    loss = schedule.weighted_loss(golden["model_output"], noisy, golden["x0"], golden["idx"])
    torch.testing.assert_close(loss, golden["loss"], rtol=1e-5, atol=0)
