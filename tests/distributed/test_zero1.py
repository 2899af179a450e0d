"""zero1: one process's results, and runs that go on under it and under layerzero, from each other's state."""

import json
from pathlib import Path

import pytest

from cvx_core import run
from tests.distributed.harness import on_ranks
from tests.distributed.matrix import compare_all

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
autoencoder: {use: cogvideox-vae, latent_channels: 4, base_channels: 8, blocks_per_level: 1}
dataset: {use: synthetic, rows: 9}
loader: {batch: 4}
optimizer: {use: adamw, lr: 1e-3, weight_decay: 1e-2}
task: {use: train, steps: 8, trackers: [], warmup: 2}
"""
LINKS = [
    (2, 2, [{"use": "zero1"}], 2),
    (4, 1, [{"use": "layerzero", "zero3_size": 2}], 4),
    (4, 2, [{"use": "zero1"}, {"use": "tp"}], 6),
]
"""(ranks, rows per data rank, strategies, step to stop after) of each link; one process does the rest."""


def test_alone():
    compare_all([(variant, [{"use": "zero1"}]) for variant in ("1.0-t2v", "1.5-i2v")], world=2)


def test_a_run_goes_on_under_other_strategies(tmp_path):
    """Each link reads the state that the one before wrote, and trains on as one process would have."""
    (tmp_path / "r.yaml").write_text(RECIPE)

    def argv(out: str, *settings: str) -> list[str]:
        return [
            str(tmp_path / "r.yaml"),
            *(f"--set={item}" for item in (f"output={tmp_path / out}", *settings)),
        ]

    assert run.main(argv("alone")) == 0
    for world, batch, parallel, last in LINKS:
        settings = [f"loader.batch={batch}", f"parallel={json.dumps(parallel)}", "task.resume=auto"]
        assert on_ranks(world, run.main, argv("chain", *settings, f"task.stop_at={last}")) == [0] * world
    assert run.main(argv("chain", "task.resume=auto")) == 0
    losses = [_losses(tmp_path / out) for out in ("chain", "alone")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6, rel=0)


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
