"""Tiny recipes and a way to run them."""

import json

import pytest
import yaml

from cvx_core.recipe import override, parse
from cvx_core.run import run
from cvx_core.spec import resolve

TINY = """
device: cpu
video: {frames: 9, height: 32, width: 48, fps: 8}
predictor:
  use: cogvideox
  num_layers: 2
  num_heads: 2
  head_dim: 16
  latent_channels: 4
  text_dim: 32
  text_length: 16
  temb_dim: 32
text_encoder: {use: t5, num_layers: 1, dim: 32, num_heads: 2, tokenizer: bytes}
autoencoder:
  use: cogvideox-vae
  latent_channels: 4
  base_channels: 4
  channel_multipliers: [1, 1, 2, 2]
  blocks_per_level: 1
dataset: {use: synthetic, rows: 6}
loader: {batch: 2}
optimizer: {use: adamw, lr: 1e-3}
task: {use: train, steps: 4, trackers: []}
"""


@pytest.fixture
def tiny():
    """The tiny training recipe as data, to be changed."""
    return yaml.safe_load(TINY)


@pytest.fixture
def launch(tmp_path):
    """Run recipe data with overrides; return the output folder."""

    def go(data, **overrides):
        recipe = override(parse(yaml.safe_dump(data), base=tmp_path), overrides)
        spec = resolve(recipe)
        run(spec)
        return spec.output

    return go


@pytest.fixture
def log_of():
    """Read log.jsonl of a run."""
    return lambda folder: [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
