"""Sampling on several ranks: the videos of one process, each written once, for any number of prompts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cvx_core import RecipeError, run
from cvx_core.recipe import parse
from cvx_core.spec import resolve
from cvx_plugins.tasks import sample
from tests.distributed.harness import on_ranks

TRAIN = """
device: cpu
video: {frames: 17, height: 32, width: 48, fps: 8}
predictor:
  use: cogvideox
  num_layers: 2
  num_heads: 3
  head_dim: 16
  latent_channels: 4
  text_dim: 32
  text_length: 8
  temb_dim: 32
text_encoder: {use: t5, num_layers: 1, dim: 32, num_heads: 2, max_length: 8, tokenizer: bytes}
autoencoder: {use: cogvideox-vae, latent_channels: 4, base_channels: 4, blocks_per_level: 1}
dataset: {use: synthetic, rows: 2}
optimizer: {use: adamw, lr: 1e-2}
task: {use: train, steps: 1, trackers: [], export: {use: hf}, export_whole: true}
"""
PROMPTS = ["a red circle", "a blue square", "a ring"]
CFG, CP, RING = {"use": "cfg-parallel"}, {"use": "cp", "ulysses": 2}, {"use": "cp", "ring": 2}
TP, SHARED, VAE = {"use": "tp"}, {"use": "tp", "sequence": True}, {"use": "vae-cp"}
DDP, ZERO3 = {"use": "ddp"}, {"use": "zero3"}
ON_2 = [[CP, VAE], [RING], [TP], [SHARED, VAE], [CFG], [CFG, VAE], [DDP], [ZERO3]]
ON_4 = [
    [CFG, CP, VAE],
    [CFG, DDP],
    [CP, ZERO3],
    [TP, ZERO3, VAE],
    [CFG, ZERO3],
    [ZERO3],
    [DDP, TP],
]


def recipe(model: Path, output: Path, parallel: list[dict], **task: object) -> str:
    return yaml.safe_dump(
        {
            "model": str(model),
            "device": "cpu",
            "output": str(output),
            "video": {"frames": 17, "height": 32, "width": 48, "fps": 8},
            "dataset": {"use": "prompts", "prompts": PROMPTS},
            "text_encoder": {"tokenizer": "bytes"},
            "parallel": parallel,
            "task": {"use": "sample", "steps": 2, "guidance": 3.0, "sheet": True, **task},
        }
    )


def from_images(text: str, folder: Path) -> str:
    """Return the recipe with a first frame for each prompt."""
    data = yaml.safe_load(text)
    images = []
    for number, shade in enumerate(np.linspace(30, 220, len(PROMPTS))):
        image = np.full((32, 48, 3), shade, np.uint8)
        image[8 : 8 + 4 * number, 8:20] = 255
        images.append(str(folder / f"{number}.png"))
        Image.fromarray(image).save(images[-1])
    data["dataset"]["images"] = images
    return yaml.safe_dump(data)


def sampled(texts: list[str]) -> list[tuple[dict[str, torch.Tensor], list[str]]]:
    """Run recipes; return of each {video: frames before rounding} decoded here, and the records written."""
    results = []
    write, to_uint8, write_json = sample.Sample._write, sample.to_uint8, sample.write_json
    for text in texts:
        frames: dict[str, torch.Tensor] = {}
        written: list[str] = []
        names: list[str] = []

        def noted(self, job, latent, parts, spec, names=names):
            names.append(job.name)
            write(self, job, latent, parts, spec)

        def kept(video, frames=frames, names=names):
            frames[names[-1]] = video.clone()
            return to_uint8(video)

        def json_noted(path, record, written=written):
            written.append(path.name)
            write_json(path, record)

        sample.Sample._write, sample.to_uint8, sample.write_json = noted, kept, json_noted
        try:
            run.run(resolve(parse(text)))
        finally:
            sample.Sample._write, sample.to_uint8, sample.write_json = write, to_uint8, write_json
        results.append((frames, written))
    return results


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "r.yaml").write_text(TRAIN)
    assert run.main([str(folder / "r.yaml"), f"--set=output={folder}"]) == 0
    return folder / "model"


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory) -> tuple[dict[str, torch.Tensor], list[str]]:
    [result] = sampled([recipe(model, tmp_path_factory.mktemp("alone"), [])])
    return result


@pytest.mark.parametrize(("world", "cases"), [(2, ON_2), pytest.param(4, ON_4, marks=pytest.mark.slow)])
def test_several_ranks_sample_the_videos_of_one(world, cases, model, alone, tmp_path):
    texts = [recipe(model, tmp_path / str(i), parallel) for i, parallel in enumerate(cases)]
    ranks = on_ranks(world, sampled, texts)
    expected, files = alone
    for number, parallel in enumerate(cases):
        videos = [rank[number][0] for rank in ranks]
        assert set().union(*videos) == expected.keys()
        for frames in videos:
            for name, video in frames.items():
                assert float((video - expected[name]).abs().max()) < 1e-5, (parallel, name)
        assert sorted(file for rank in ranks for file in rank[number][1]) == sorted(files), parallel
        assert (tmp_path / str(number) / "sheet.png").exists()


@pytest.mark.slow
def test_several_ranks_sample_from_images_what_one_does_compiled_too(tmp_path):
    train = yaml.safe_load(TRAIN)
    train["predictor"] |= {"image_condition": True}
    train["output"] = str(tmp_path)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(train))
    assert run.main([str(tmp_path / "r.yaml")]) == 0

    def text(name: str, parallel: list[dict]) -> str:
        return from_images(recipe(tmp_path / "model", tmp_path / name, parallel), tmp_path)

    compiled = {"use": "compile", "backend": "aot_eager"}
    cases = [[CP, VAE], [CFG], [SHARED, compiled], [ZERO3]]
    [(expected, _)] = sampled([text("alone", [])])
    ranks = on_ranks(2, sampled, [text(str(number), parallel) for number, parallel in enumerate(cases)])
    for number, parallel in enumerate(cases):
        assert set().union(*(rank[number][0] for rank in ranks)) == expected.keys()
        for rank in ranks:
            for name, video in rank[number][0].items():
                assert float((video - expected[name]).abs().max()) < 1e-5, (parallel, name)


def test_one_rank_after_another_takes_what_is_left(model, alone, tmp_path):
    """With 2 of 3 videos there, one rank has nothing to do, but for its part of the predictor."""
    text = recipe(model, tmp_path, [ZERO3], sheet=False)
    on_ranks(2, sampled, [text])
    names = sorted(alone[0])
    for name in names[::2]:
        (tmp_path / f"{name}.json").unlink()
    before = (tmp_path / f"{names[1]}.mp4").stat().st_mtime_ns
    ranks = on_ranks(2, sampled, [text])
    assert [sorted(rank[0][0]) for rank in ranks] == [[names[0]], [names[2]]]
    assert (tmp_path / f"{names[1]}.mp4").stat().st_mtime_ns == before
    assert json.loads((tmp_path / f"{names[2]}.json").read_text())["prompt"] == PROMPTS[2]


def test_cfg_parallel_is_refused_where_there_is_one_prediction(model, tmp_path):
    with pytest.raises(RecipeError, match=r"guidance 1 asks for one prediction instead of 2"):
        resolve(parse(recipe(model, tmp_path, [CFG], guidance=1.0)))
    with pytest.raises(RecipeError, match=r"task 'train' has not"):
        resolve(parse(yaml.safe_dump({**yaml.safe_load(TRAIN), "parallel": [CFG]})))
