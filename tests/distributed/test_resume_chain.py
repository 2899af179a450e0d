"""One run on four meshes in turn, each from the checkpoint of the one before, beside one process that never
stopped.
"""

import json
from pathlib import Path

import pytest
import torch

from cvx_core import run
from cvx_io import resume
from cvx_io.tensors.dcp_metadata import read_checkpoint
from tests.distributed.harness import on_ranks

RECIPE = """
device: cpu
dtype: float32
video: {frames: 9, height: 32, width: 48, fps: 8}
predictor:
  use: cogvideox
  num_layers: 2
  num_heads: 3
  head_dim: 16
  latent_channels: 4
  text_dim: 32
  text_length: 5
  temb_dim: 32
text_encoder: {use: t5, num_layers: 1, dim: 32, num_heads: 2, max_length: 5, tokenizer: bytes}
autoencoder: {use: cogvideox-vae, latent_channels: 4, base_channels: 4, blocks_per_level: 1}
dataset: {use: synthetic, rows: 9}
loader: {batch: 4}
optimizer: {use: adamw, lr: 1e-3, weight_decay: 1e-2}
task: {use: train, steps: 8, trackers: [], save_every: 1, keep: 9, warmup: 2, ema: {decay: 0.9}}
"""
LINKS = [
    (4, 2, ["tp", "zero2"], 2),
    (4, 1, ["zero3"], 4),
    (4, 4, ["cp", "pp"], 6),
]
"""(ranks, rows per data rank, strategies, step to stop after) of each link; one process does the rest."""


def strategy(name: str) -> dict:
    return {"use": name, **{"tp": {"size": 2}, "cp": {"ulysses": 2}, "pp": {"size": 2}}.get(name, {})}


def run_all(argvs: list[list[str]]) -> list[int]:
    """Run recipes one after the other; returns their exit codes."""
    return [run.main(argv) for argv in argvs]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def held(path: Path) -> dict[str, object]:
    """Return all that a checkpoint holds, whole."""
    checkpoint = read_checkpoint(path)
    state: dict[str, object] = {
        name: torch.empty(saved.info.shape, dtype=getattr(torch, saved.info.dtype))
        for name, saved in checkpoint.tensors.items()
    }
    state |= dict.fromkeys(checkpoint.objects)
    resume.restore(path, state)
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`alone`: one process, never stopped; `chain`: the links; `again-N`: step N of a link once more."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "r.yaml").write_text(RECIPE)

    def argv(out: str, *settings: str) -> list[str]:
        return [str(folder / "r.yaml"), *(f"--set={item}" for item in (f"output={folder / out}", *settings))]

    assert run.main(argv("alone", "task.save_every=2")) == 0
    for world, batch, names, last in LINKS:
        parallel = json.dumps([strategy(name) for name in names])
        settings = [f"loader.batch={batch}", f"parallel={parallel}"]
        steps = [argv("chain", *settings, "task.resume=auto", f"task.stop_at={last}")]
        source = f"task.resume={folder / 'chain' / 'checkpoints' / f'step-{last - 1:08d}'}"
        steps += [argv(f"again-{last}", *settings, source, f"task.stop_at={last}")]
        assert on_ranks(world, run_all, steps) == [[0, 0]] * world
    assert run.main(argv("chain", "task.resume=auto")) == 0
    return folder


def test_every_link_goes_on_as_if_nothing_had_been_stopped(folder):
    chain, alone = lines(folder / "chain"), lines(folder / "alone")
    assert [line["rows"] for line in chain] == [line["rows"] for line in alone]
    for mine, other in zip(chain, alone, strict=True):
        print(
            mine["step"], mine["loss"], other["loss"] - mine["loss"], mine["grad_norm"] - other["grad_norm"]
        )
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-6, rel=0)
        assert mine["lr"] == other["lr"]


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_parameters_and_optimizer_state_are_those_of_one_process(folder, step):
    name = f"checkpoints/step-{step:08d}"
    mine, other = held(folder / "chain" / name), held(folder / "alone" / name)
    assert mine.keys() == other.keys()
    for key, value in other.items():
        if isinstance(value, torch.Tensor):
            close = 1e-5 * float(value.abs().max()) if ".exp_avg" in key else 1e-5
            torch.testing.assert_close(mine[key], value, rtol=0, atol=max(close, 1e-12))
        else:
            assert mine[key] == value


@pytest.mark.parametrize("step", [2, 4, 6])
def test_on_the_same_mesh_a_run_goes_on_bit_for_bit(folder, step):
    name = f"checkpoints/step-{step:08d}"
    mine, other = held(folder / f"again-{step}" / name), held(folder / "chain" / name)
    assert mine.keys() == other.keys()
    for key, value in other.items():
        assert torch.equal(mine[key], value) if isinstance(value, torch.Tensor) else mine[key] == value, key
