"""A run killed by SIGKILL again and again, at moments that a seed draws: it ends as if nothing had been."""

import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from cvx_core import run
from cvx_io import resume
from cvx_plugins.tasks import loop

SEED = 20
KILLS = 20
STEPS = 80
MOST_STEPS, MOST_S = 4, 0.1
"""A run is killed after so many steps of its own, 0 to MOST_STEPS, and then up to so many seconds."""

RECIPE = """
device: cpu
video: {frames: 1, height: 32, width: 32, fps: 8}
predictor:
  use: cogvideox
  num_layers: 1
  num_heads: 2
  head_dim: 16
  latent_channels: 4
  text_dim: 16
  text_length: 4
  temb_dim: 16
text_encoder: {use: t5, num_layers: 1, dim: 16, num_heads: 2, max_length: 4, tokenizer: bytes}
autoencoder: {use: cogvideox-vae, latent_channels: 4, base_channels: 8, blocks_per_level: 1}
dataset: {use: synthetic, rows: 7}
optimizer: {use: adamw, lr: 1e-3}
task: {use: train, steps: 80, schedule: cosine, ema: {decay: 0.9}, trackers: [], save_every: 1, resume: auto}
"""
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["cvx_core.testing.preload"])


def train(argv: list[str], told) -> None:
    """Run a recipe; says through `told` where it goes on from, and each step, at the moment of it."""
    torch.set_num_threads(1)
    find, update = resume.find, loop.Loop._update

    def found(*args):
        path = find(*args)
        told.send(path.name if path is not None else None)
        return path

    def updated(*args):
        told.send("step")
        return update(*args)

    resume.find, loop.Loop._update = found, updated
    os._exit(run.main(argv))


def start(argv: list[str]):
    """Start a run; return its process, what it goes on from, and what it says later."""
    mine, other = _context.Pipe(duplex=False)
    process = _context.Process(target=train, args=(argv, other))
    process.start()
    other.close()
    assert mine.poll(60), "the run did not start"
    return process, mine.recv(), mine


def tensors(folder: Path) -> dict:
    """Return all that the newest checkpoint of a run holds."""
    path = resume.complete(folder / "checkpoints")[-1]
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(info.size, dtype=info.properties.dtype) if hasattr(info, "size") else None
        for name, info in metadata.items()
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return {"folder": path.name, **state}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name])
        if isinstance(one[name], torch.Tensor)
        else one[name] == other[name]
        for name in one
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)

    def argv(out: str, beside: bool = False) -> list[str]:
        return [
            str(tmp_path / "r.yaml"),
            f"--set=output={tmp_path / out}",
            f"--set=task.async_save={str(beside).lower()}",
        ]

    process, _, _told = start(argv("whole"))
    process.join()
    assert process.exitcode == 0
    drawn = random.Random(SEED)
    story = [f"seed {SEED}"]
    checkpoints = tmp_path / "hit" / "checkpoints"
    kills = in_a_save = 0
    while kills < KILLS:
        beside, steps, wait_s = drawn.random() < 0.5, drawn.randint(0, MOST_STEPS), drawn.uniform(0, MOST_S)
        there = resume.complete(checkpoints)
        expected = there[-1].name if there else None
        process, goes_on, told = start(argv("hit", beside))
        story.append(f"from {goes_on}, killed {steps} steps and {wait_s:.3f} s later, async_save {beside}")
        assert goes_on == expected, story
        for _ in range(steps):
            assert told.poll(60), story
            told.recv()
        process.join(wait_s)
        assert process.is_alive(), f"it ended too early; raise STEPS: {story}"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, story
        kills += 1
        in_a_save += any(checkpoints.glob(".step-*"))
    assert in_a_save, "no kill hit a save"
    there = resume.complete(checkpoints)[-1].name
    assert there < f"step-{STEPS:08d}", story
    process, goes_on, told = start(argv("hit"))
    process.join()
    assert (process.exitcode, goes_on) == (0, there), story
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "hit")), story
    logs = [(tmp_path / out / "log.jsonl").read_bytes() for out in ("whole", "hit")]
    assert logs[0] == logs[1], story
