"""Validation on two ranks: the figures and videos of one process, and training that does not notice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from cvx_core import run
from cvx_plugins.tasks import validation_videos
from tests.distributed.harness import on_ranks
from tests.distributed.test_train import RECIPE

PROMPTS = {"use": "prompts", "prompts": ["a red circle", "a ring", "a square"]}
VALIDATION = {
    "every": 1,
    "loss": {"dataset": {"use": "synthetic", "rows": 3, "seed": 1}, "bands": 2},
    "videos": {"dataset": PROMPTS, "steps": 2, "guidance": 2.0},
}
LORA = {"adapter": {"use": "lora", "rank": 2}, "export": {"use": "diffusers-lora"}}
ZERO2 = {"zero2": [{"use": "zero2"}]}
SLOW = {
    "ddp": [{"use": "ddp"}],
    "zero1": [{"use": "zero1"}],
    "zero3": [{"use": "zero3"}],
    "layerzero": [{"use": "layerzero", "zero3_size": 2}],
    "tp": [{"use": "tp"}, {"use": "encoder-dp"}],
    "cp": [{"use": "cp", "ulysses": 2}, {"use": "vae-cp"}],
    "interleave": [{"use": "ddp"}, {"use": "interleave", "rounds": 2}],
}


def recipe(folder: Path, name: str, parallel: list[dict], looks: bool, lora: bool = False) -> list[str]:
    data = yaml.safe_load(RECIPE)
    reads = any(strategy["use"] in ("tp", "cp") for strategy in parallel) or not parallel
    data |= {"output": str(folder / name), "parallel": parallel, "loader": {"batch": 2 if reads else 1}}
    data["video"] = {"frames": 9, "height": 32, "width": 32, "fps": 8}
    data["text_encoder"]["max_length"] = data["predictor"]["text_length"] = 64
    data["optimizer"]["lr"] = 0.01
    data["task"] |= {"steps": 2, "ema": {"decay": 0.5, "warmup": False, "export": False}}
    if looks:
        data["task"]["validation"] = VALIDATION
    if lora:
        data["adapter"] = LORA["adapter"]
        data["task"]["export"] = LORA["export"]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return [str(path)]


def frames_of(argvs: list[list[str]]) -> dict[str, np.ndarray]:
    """Run recipes; return the frames of the validation videos that this rank wrote, before they are coded."""
    frames: dict[str, np.ndarray] = {}
    writes = validation_videos.write_mp4

    def noted(path: Path, video: np.ndarray, *more) -> None:
        frames["/".join(path.parts[-4:])] = video
        writes(path, video, *more)

    validation_videos.write_mp4 = noted
    try:
        assert [run.main(argv) for argv in argvs] == [0] * len(argvs)
    finally:
        validation_videos.write_mp4 = writes
    return frames


def found(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "validation/failed" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    [path] = [p for p in folder.rglob("*.safetensors") if "checkpoints" not in p.parts]
    return load_file(path)


def compare(folder: Path, argvs: list[list[str]], names: list[str], lora: bool = False) -> None:
    """Run recipes on two ranks, and compare what they leave with one process, and without validation."""
    videos = frames_of([recipe(folder, "alone", [], True, lora)])
    written = [frames.items() for frames in on_ranks(2, frames_of, argvs)]
    several = {name: video for items in written for name, video in items}
    assert sum(map(len, written)) == len(several) == len(videos) * len(names) == 12 * len(names)
    for name, video in several.items():
        one = videos[str(Path("alone", *Path(name).parts[1:]))]
        assert np.abs(video.astype(int) - one).max() <= 1, name
    expected = found(folder / "alone")
    assert [line["step"] for line in expected] == [0, 1, 2]
    assert len({line["validation/loss"] for line in expected}) == 3
    for name in names:
        looked, plain = weights(folder / name), weights(folder / f"{name}-plain")
        assert all(torch.equal(looked[key], plain[key]) for key in plain), name
        for line, one in zip(found(folder / name), expected, strict=True):
            assert line["validation/failed"] == 0, name
            for key in ("validation/loss", "validation/loss_band_0", "validation/loss_band_1"):
                assert line[key] == pytest.approx(one[key], rel=2e-5), (name, key)
        assert (folder / name / "validation/step-000002.mp4").exists()


def test_zero2_validates_with_the_average_as_one_process_does(tmp_path):
    both = [recipe(tmp_path, f"zero2{end}", ZERO2["zero2"], not end) for end in ("", "-plain")]
    compare(tmp_path, both, ["zero2"])


@pytest.mark.matrix
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_other_strategies_do_too(lora, tmp_path):
    names = ["ddp", "zero3", "tp"] if lora else list(SLOW)
    argvs = [
        recipe(tmp_path, f"{name}{end}", SLOW[name], not end, lora)
        for name in names
        for end in ("", "-plain")
    ]
    compare(tmp_path, argvs, names, lora)
