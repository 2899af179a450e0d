"""Optimizers on two ranks: the losses of one process, each run going on from the layout of the one before."""

import json
from pathlib import Path

import pytest

from cvx_core import CvxError, run
from cvx_core.recipe import load
from cvx_core.spec import resolve
from tests.distributed.harness import on_ranks

RECIPE = """
device: cpu
video: {frames: 9, height: 32, width: 48, fps: 8}
predictor:
  use: cogvideox
  num_layers: 2
  num_heads: 2
  head_dim: 64
  latent_channels: 4
  text_dim: 32
  text_length: 5
  temb_dim: 32
text_encoder: {use: t5, num_layers: 1, dim: 32, num_heads: 2, max_length: 5, tokenizer: bytes}
autoencoder: {use: cogvideox-vae, latent_channels: 4, base_channels: 4, blocks_per_level: 1}
dataset: {use: synthetic, rows: 8}
loader: {batch: 4}
task: {use: train, steps: 4, trackers: []}
"""
DATA = ("ddp", "zero1", "zero2", "zero3")
CHAINS = {
    "8-bit": ({"use": "adamw-8bit", "lr": 1e-3, "block": 64}, "float32", ["zero1", "tp", "zero3"], 1e-5),
    "masters": (
        {"use": "adamw", "lr": 1e-3, "master_weights": "float32"},
        "bfloat16",
        ["zero2", "zero1", "pp"],
        5e-4,
    ),
    "came": ({"use": "came", "lr": 1e-3, "offload": "state"}, "float32", ["ddp", "pp"], 1e-6),
    "prodigy": ({"use": "prodigy", "d0": 1e-3, "offload": "state"}, "float32", ["ddp"], 1e-6),
}
"""(optimizer, dtype, strategies for a step each, most difference of a loss); one process ends each run."""


def argv(folder: Path, name: str, out: str, *settings: str) -> list[str]:
    optimizer, dtype = CHAINS[name][:2]
    stated = [
        f"output={folder / name / out}",
        f"dtype={dtype}",
        f"optimizer={json.dumps(optimizer)}",
        *settings,
    ]
    return [str(folder / "r.yaml"), *(f"--set={item}" for item in stated)]


def link(folder: Path, name: str, use: str, last: int) -> list[str]:
    batch = 2 if use in DATA else 4
    settings = [f"loader.batch={batch}", f"parallel={json.dumps([{'use': use}])}", "task.resume=auto"]
    return argv(folder, name, "chain", *settings, f"task.stop_at={last}")


def run_all(argvs: list[list[str]]) -> list[int]:
    return [run.main(arguments) for arguments in argvs]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_runs_go_on_under_other_strategies(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    links = [
        link(tmp_path, name, use, number + 1)
        for name, (_, _, chain, _) in CHAINS.items()
        for number, use in enumerate(chain)
    ]
    assert on_ranks(2, run_all, links) == [[0] * len(links)] * 2
    for name, (*_, most) in CHAINS.items():
        assert run.main(argv(tmp_path, name, "chain", "task.resume=auto")) == 0
        assert run.main(argv(tmp_path, name, "alone")) == 0
        chain, alone = (losses(tmp_path / name / out) for out in ("chain", "alone"))
        assert chain == pytest.approx(alone, abs=most, rel=0), name
        assert alone[-1] != pytest.approx(alone[0], abs=most)


def test_8bit_blocks_of_factors_that_tp_would_cut_are_refused(tmp_path):
    """Which layers have factors is known once they are there; of whole layers the check knows it."""
    (tmp_path / "r.yaml").write_text(RECIPE + "adapter: {use: lora, rank: 4}\n")
    settings = [item.removeprefix("--set=") for item in link(tmp_path, "8-bit", "tp", 1)[1:]]
    said = on_ranks(2, refusal, tmp_path / "r.yaml", [*settings, "optimizer.block=128"])
    for text in said:
        assert "a rank holds 64 values of each row" in text
        assert "Use block: 64" in text


def refusal(path: Path, settings: list[str]) -> str:
    """Return what a run is refused with."""
    try:
        run.run(resolve(load(path, settings), world=2))
    except CvxError as error:
        return str(error)
    return ""
