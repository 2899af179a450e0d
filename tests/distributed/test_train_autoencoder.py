"""The train-autoencoder task on two ranks: what it logs, measures and exports, beside one process."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cvx_core import run
from tests.distributed.harness import on_ranks
from tests.distributed.test_train import lines, run_all

RECIPE = """
device: cpu
dtype: float64
video: {frames: 9, height: 32, width: 48, fps: 8}
autoencoder: {use: cogvideox-vae, latent_channels: 4, base_channels: 4, blocks_per_level: 1}
dataset: {use: synthetic, rows: 4}
optimizer: {use: adamw, lr: 1e-3}
task: {use: train-autoencoder, steps: 2, trackers: [], measure_scale: true, export: {use: hf}}
"""
USES = {
    "ddp": "{use: ddp}",
    "zero1": "{use: zero1}",
    "zero2": "{use: zero2}",
    "zero3": "{use: zero3}",
    "layerzero": "{use: layerzero, zero3_size: 2}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two ranks make of a recipe, by strategy, and `one` process with batches of two rows."""
    folder = tmp_path_factory.mktemp("autoencoder")
    (folder / "r.yaml").write_text(RECIPE)
    argvs = {
        use: [str(folder / "r.yaml"), f"--set=output={folder / use}", f"--set=parallel=[{entry}]"]
        for use, entry in USES.items()
    }
    assert on_ranks(2, run_all, list(argvs.values())) == [[0] * len(USES)] * 2
    one = [str(folder / "r.yaml"), f"--set=output={folder / 'one'}", "--set=loader.batch=2"]
    assert run.main(one) == 0
    return folder


@pytest.mark.parametrize("use", USES)
def test_two_ranks_train_as_one_process_with_their_rows(folder, use):
    for mine, other in zip(lines(folder / use), lines(folder / "one"), strict=True):
        assert mine["rows"] == other["rows"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-10)
    exported, expected = (
        load_file(folder / name / "model" / "diffusion_pytorch_model.safetensors") for name in (use, "one")
    )
    assert exported.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(exported[name], value, rtol=0, atol=1e-7)
    scales = [json.loads((folder / name / "model" / "config.json").read_text()) for name in (use, "one")]
    assert scales[0]["scaling_factor"] == pytest.approx(scales[1]["scaling_factor"], rel=1e-3)
