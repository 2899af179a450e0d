"""Sampling in flavour 'sat' against tables and trajectories of the SAT code."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cvx_core import Registry

SOLVERS = {
    "ddim": ("ddim", {}),
    "sdedpmpp2m": ("dpm", {"solver": "sde"}),
    "odedpmpp2m": ("dpm", {"solver": "ode"}),
}


def scheduler(use: str, **fields: Any) -> Any:
    component = Registry.discover().get("scheduler", use)
    return component.load()(component.config(flavour="sat", **fields), None)


@pytest.fixture(scope="module")
def tables(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "fixtures/sat/sampler/tables.safetensors")


@pytest.fixture(scope="module")
def runs(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "fixtures/sat/sampler/trajectories.safetensors")


@pytest.fixture(scope="module")
def config(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "fixtures/sat/sampler/config.json").read_text())


def shifts(keys: Any) -> list[float]:
    return sorted({float(key.split(".")[0].removeprefix("shift")) for key in keys if key.startswith("shift")})


def test_training_tables_are_the_reference_ones(tables: dict[str, Tensor]) -> None:
    for shift in shifts(tables):
        made = scheduler("ddim", snr_shift=shift)
        before = tables[f"shift{shift:g}.alphas_cumprod_before_zero_snr"]
        torch.testing.assert_close(made.sampling.alpha_bar, before, rtol=0, atol=1e-15)
        train = tables[f"shift{shift:g}.train_table"].double()
        torch.testing.assert_close(made.noise.alpha_bar.sqrt(), train, rtol=0, atol=1.2e-7)
        assert made.noise.alpha_bar[-1] == 0


def test_sampling_tables_and_timesteps_are_the_reference_ones(tables: dict[str, Tensor]) -> None:
    keys = [key.rsplit(".", 1)[0] for key in tables if key.endswith(".timesteps")]
    assert keys
    for key in keys:
        shift, steps = key.removeprefix("shift").split(".steps")
        made = scheduler("ddim", snr_shift=float(shift))
        timesteps = made.timesteps(int(steps))
        assert timesteps == tables[f"{key}.timesteps"].tolist()
        table = made.sampling.sampled_table(timesteps)
        torch.testing.assert_close(table, tables[f"{key}.alphas_cumprod_sqrt"].double(), rtol=0, atol=1.2e-7)


def test_prediction_is_read_at_the_nearest_training_level(config: dict[str, Any]) -> None:
    keys = [key.removeprefix("quantised_idx.") for key in config["meta"] if key.startswith("quantised_idx.")]
    assert keys
    for key in keys:
        shift, steps = key.removeprefix("shift").split(".steps")
        sampling = scheduler("ddim", snr_shift=float(shift)).sampling
        table = sampling.sampled_table(sampling.timesteps(int(steps)))
        assert [sampling.snap(level) for level in table[:-1]] == config["meta"][f"quantised_idx.{key}"]


def test_dynamic_guidance_is_the_reference_one(tables: dict[str, Tensor]) -> None:
    keys = [key for key in tables if key.startswith("dynamic_cfg.")]
    assert keys
    for key in keys:
        steps, setting = key.removeprefix("dynamic_cfg.steps").split(".", 1)
        scale, exponent = setting.removeprefix("scale").split("_exp")
        made = scheduler("ddim", guidance_exponent=int(exponent))
        timesteps = made.timesteps(int(steps))
        weights = [made.guidance(float(scale), index, timesteps) for index in range(int(steps))]
        torch.testing.assert_close(
            torch.tensor(weights, dtype=torch.float64), tables[key], rtol=1e-6, atol=1e-6
        )


def toy_v(latent: Tensor, timestep: int, condition: Tensor) -> Tensor:
    """The network of the fixture's README."""
    c = condition[:, 0, 0].view(-1, *[1] * (latent.ndim - 1))
    return 0.5 * latent.tanh() + 0.1 * timestep / 1000 + 0.3 * c * latent.cos()


def cases(shared_keys: Any) -> list[str]:
    return sorted(key.removesuffix(".final") for key in shared_keys if key.endswith(".final"))


def test_trajectories_are_the_reference_ones(runs: dict[str, Tensor], config: dict[str, Any]) -> None:
    assert len(cases(runs)) >= 10
    for case in cases(runs):
        shift, solver, guidance = case.removeprefix("shift").split(".")
        use, fields = SOLVERS[solver]
        made = scheduler(use, snr_shift=float(shift), guidance_exponent=config["dynamic_exp"], **fields)
        follow(made, runs, config, case, guidance == "dynamic")


def follow(made: Any, runs: dict[str, Tensor], config: dict[str, Any], case: str, is_dynamic: bool) -> None:
    """Sample with the stored noise, frames before channels in the file, and compare every step."""
    timesteps, scale = made.timesteps(config["num_steps"]), float(config["guidance_scale"])
    latent, memory = runs["x_init"].transpose(1, 2), None
    draws = [0] * len(timesteps)

    def stored(latent: Tensor, generator: Any) -> Tensor:
        draws[index] += 1
        return runs[f"{case}.noise"][index].transpose(1, 2)

    if case.split(".")[1] != "ddim":
        made = dataclasses.replace(made, gaussian=stored)
    for index, timestep in enumerate(timesteps):
        cond, uncond = (toy_v(latent, timestep, runs[name]) for name in ("cond", "uncond"))
        weight = made.guidance(scale, index, timesteps) if is_dynamic else scale
        latent, memory = made.step(uncond + weight * (cond - uncond), index, timesteps, latent, memory, None)
        same(latent, runs[f"{case}.x"][index], f"{case} step {index}")
        if f"{case}.denoised" in runs:
            same(memory, runs[f"{case}.denoised"][index], f"{case} x0 of step {index}")
    same(latent, runs[f"{case}.final"], f"{case} final")
    assert draws == config["meta"][case]["randn_draws_per_step"]


def same(ours: Tensor, reference: Tensor, where: str) -> None:
    """Compare (B,C,T,h,w) with (B,T,C,h,w)."""
    expected = reference.transpose(1, 2)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5, msg=lambda text: f"{where}: {text}")


def test_direct_denoiser_calls_are_the_reference_ones(runs: dict[str, Tensor]) -> None:
    noise = scheduler("ddim").noise
    x, timestep = runs["denoiser.x"], runs["denoiser.idx"]
    prediction = torch.stack(
        [0.5 * row.tanh() + 0.1 * t / 1000 for row, t in zip(x, timestep.tolist(), strict=True)]
    )
    x0 = noise.to_x0(prediction, x, timestep)
    torch.testing.assert_close(x0, runs["denoiser.denoised"], rtol=0, atol=1e-5)
