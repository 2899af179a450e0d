"""The demo's LoRA on a base of a shorter training: the new motion with it, not without it."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from cvx_core import run
from cvx_io import video_write

DEMO = Path(__file__).resolve().parents[2] / "recipes/demo"
SHORTER = ("task.steps=500", "task.warmup=30", "optimizer.lr=1.5e-3", "loader.batch=16")


KEPT = "(red|blue){}(circle|square)"


def script(name, *arguments):
    """Run one of the demo's scripts here, where what it needs is imported already; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DEMO))
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(DEMO / name), run_name="__main__")
        except SystemExit as stop:
            return stop.code
    return 0


def write_kept(path, *arguments, write=video_write.write_mp4, **options):
    """Write a clip if it is one of those that are kept."""
    if re.match(KEPT.format("-"), path.name):
        write(path, *arguments, **options)


def clips(folder, *arguments):
    """Write clips of two colours and two shapes alone: a third of the work, for a world that is as small.

    Triangles are left out: the smallest, after so few steps they are too faint to be told from the ground.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_write, "write_mp4", write_kept)  # the others are drawn all the same
        assert script("make_clips.py", folder, *arguments) == 0
    for file in (folder / "clips.jsonl", folder / "prompts.txt"):
        lines = file.read_text().splitlines(keepends=True)
        kept = (line for line in lines if re.search(f"a {KEPT.format(' ')}", line))
        file.write_text("".join(kept))
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Have sums in one order, on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def launch(recipe, *overrides):
    assert run.main([str(DEMO / recipe), *(f"--set={override}" for override in overrides)]) == 0


@pytest.mark.slow
def test_a_lora_learns_a_motion_that_the_base_does_not_know(tmp_path):
    base, lora = tmp_path / "base", tmp_path / "lora"
    old = clips(tmp_path / "clips", "--each", 4)
    new = clips(tmp_path / "new", "--new", "--each", 16)
    launch("train.yaml", f"output={base}", f"dataset.path={old / 'clips.jsonl'}", *SHORTER)
    model = f"model={base / 'model'}"
    launch("lora.yaml", model, f"output={lora}", f"dataset.path={new / 'clips.jsonl'}", "task.steps=130")
    videos = (f"dataset.path={new / 'prompts.txt'}", "task.batch=12", "task.sheet=false")
    right = {}
    for scale, each in ((1, 6), (0, 3)):
        out = tmp_path / f"scale-{scale}"
        file = (f"adapters[0].weights.path={lora / 'adapter'}", f"adapters[0].scale={scale}")
        launch("lora-sample.yaml", model, f"output={out}", *file, *videos, f"task.videos_per_prompt={each}")
        script("score.py", out)  # 1 where the score is low, as it is without the LoRA
        score = json.loads((out / "score.json").read_text())
        assert score["of"] == 4 * each
        right[scale] = sum(video["direction"] for video in score["videos"]) / score["of"]
    assert right[1] >= 0.9
    assert right[0] < 0.1
