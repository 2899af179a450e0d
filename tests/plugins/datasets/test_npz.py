"""Latents and embeddings that other trainers kept in .npz files: read as they are, refused where they do not
fit.
"""

import numpy as np
import pytest
import torch
import yaml

from cvx_core import FormatError, RecipeError
from cvx_core.building import build
from cvx_core.interfaces import Batch, Row
from cvx_core.placing import place
from cvx_core.random import Draws
from cvx_core.recipe import override, parse
from cvx_core.run import run
from cvx_core.spec import resolve

RECIPE = """
device: cpu
video: {frames: 9, height: 32, width: 48, fps: 8}
predictor:
  use: cogvideox
  num_layers: 1
  num_heads: 2
  head_dim: 16
  latent_channels: 4
  text_dim: 32
  text_length: 16
text_encoder: {use: t5, num_layers: 1, dim: 32, num_heads: 2, tokenizer: bytes}
autoencoder: {use: cogvideox-vae, latent_channels: 4, base_channels: 8, scale_factor: 1.5}
dataset: {use: npz-cache, path: data.csv, latents: latents, texts: texts, unconditional: none.npz}
loader: {batch: 2}
task: {use: train, steps: 2, trackers: []}
"""


@pytest.fixture
def folder(tmp_path):
    """A table of two videos of the same name, their latents as (T,C,h,w), and their embeddings."""
    draw = np.random.default_rng(0)
    (tmp_path / "data.csv").write_text("video,caption\na/one.mp4,first\nb/one.mp4,second\n")
    for name in ("a/one.npz", "b/one.npz"):
        for kind in ("latents", "texts"):
            (tmp_path / kind / name).parent.mkdir(parents=True)
        mean, std = draw.normal(size=(2, 3, 4, 4, 6)).astype(np.float32)
        save(tmp_path / "latents" / name, latent_mean=mean, latent_std=abs(std))
        text = draw.normal(size=(16, 32)).astype(np.float32)
        np.savez(tmp_path / "texts" / name, text_emb=text, mask=np.arange(16) < 3)
    np.savez(tmp_path / "none.npz", text_emb=np.zeros((1, 16, 32), np.float32), mask=np.arange(16)[None] < 1)
    return tmp_path


def save(path, fps=8.0, **arrays):
    np.savez(path, fps=fps, ori_size=np.array([480, 720]), **arrays)


@pytest.fixture
def launch(folder):
    """Run the recipe with changes, in the folder of the files."""

    def go(**changes):
        data = {**yaml.safe_load(RECIPE), "output": "out"}
        spec = resolve(override(parse(yaml.safe_dump(data), base=folder), changes))
        run(spec)
        return spec.output

    return go


def test_features_are_drawn_from_what_the_files_hold(folder):
    spec = resolve(parse(RECIPE, base=folder))
    parts = place(build(spec), spec)
    assert (parts.autoencoder, parts.text_encoder) == (None, None)
    rows = parts.dataset.rows()
    assert [row.id for row in rows] == ["a/one.mp4#2", "b/one.mp4#3"]
    encoded = tuple(row.features(row.captions[0]) for row in rows)
    draws = Draws(0, 0, (0, 1))
    features = parts.encoder(Batch(rows, ("first", "second"), encoded=encoded), draws)
    for number, name in enumerate(("a", "b")):
        latent = np.load(folder / f"latents/{name}/one.npz")
        text = np.load(folder / f"texts/{name}/one.npz")
        mean, std = (torch.from_numpy(latent[key]).transpose(0, 1) for key in ("latent_mean", "latent_std"))
        noise = torch.randn(mean.shape, generator=draws.of("posterior")[number])
        assert torch.equal(features.latent[number], 1.5 * (mean + std * noise))
        assert torch.equal(features.text_embeds[number], torch.from_numpy(text["text_emb"]))
        assert features.text_mask[number].tolist() == [True] * 3 + [False] * 13


def test_training_on_them_runs_and_says_what_was_not_compared(launch, caplog):
    assert (launch() / "log.jsonl").read_text().count('"loss"') == 2
    assert "its files do not say what they were made with" in caplog.text


def test_without_embeddings_the_recipes_encoder_makes_them(folder):
    data = yaml.safe_load(RECIPE)
    del data["dataset"]["texts"], data["dataset"]["unconditional"]
    spec = resolve(parse(yaml.safe_dump(data), base=folder))
    parts = place(build(spec), spec)
    assert parts.autoencoder is None
    row: Row = parts.dataset.rows()[0]
    batch = Batch((row,), row.captions, encoded=(row.features(row.captions[0]),))
    features = parts.encoder(batch, Draws(0, 0, (0,)))
    assert torch.equal(features.text_embeds, parts.text_encoder.encode(["first"])[0])


@pytest.mark.parametrize(
    ("arrays", "fps", "says"),
    [
        ({}, 8.0, r"has no 'latent_mean', but fps, ori_size"),
        ({"latent_mean": np.zeros((4, 3, 4, 6), np.float32)}, 8.0, r"dataset.layout: cthw"),
        ({"latent_mean": np.zeros((3, 4, 4, 5), np.float32)}, 8.0, r"\[4, 3, 4, 5\] \(read as tchw\)"),
        ({"latent_mean": np.zeros((3, 4, 4, 6), np.float32)}, 24.0, r"made at 24 fps, .* video.fps is 8"),
        ({"latent_mean": np.full((3, 4, 4, 6), np.nan, np.float32)}, 8.0, r"values that are not finite"),
        (
            {"latent_mean": np.zeros((3, 4, 4, 6)), "latent_std": np.zeros((3, 4, 4, 1))},
            8.0,
            r"\[4, 3, 4, 1\]",
        ),
        ({"latent_mean": np.array([None])}, 8.0, r"latent_mean cannot be read: Object arrays"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_file(folder, launch, arrays, fps, says):
    path = folder / "latents/b/one.npz"
    save(path, fps, **arrays)
    with pytest.raises(FormatError, match=says) as error:
        launch()
    assert str(path) in str(error.value)


def test_an_unknown_fps_and_a_mean_alone_are_taken(folder, launch):
    for name in ("a", "b"):
        mean = np.zeros((3, 4, 4, 6), np.float32)
        save(folder / f"latents/{name}/one.npz", None, latent_mean=mean)
    launch()
    save(folder / "latents/b/one.npz", 24.0, latent_mean=mean)
    out = launch(**{"dataset.fps": "ignore", "task.resume": "auto", "task.steps": 4})
    assert len((out / "log.jsonl").read_text().splitlines()) == 4


def test_missing_files_and_columns_are_named_at_once(folder, launch):
    (folder / "latents/a/one.npz").unlink()
    (folder / "texts/b/one.npz").unlink()
    with pytest.raises(FormatError) as error:
        launch()
    assert "latents/a/one.npz' does not exist" in str(error.value)
    assert "texts/b/one.npz' does not exist" in str(error.value)
    with pytest.raises(FormatError, match=r"no column 'clip' among .*'video'"):
        launch(**{"dataset.video_column": "clip"})
    with pytest.raises(RecipeError, match=r"dataset.unconditional: has no effect without `texts`"):
        launch(**{"dataset.texts": None})


def test_what_latents_are_multiplied_by_has_to_be_known(folder):
    data = yaml.safe_load(RECIPE)
    del data["autoencoder"]
    with pytest.raises(RecipeError, match=r"nothing says what to multiply latents by. Add `autoencoder`"):
        resolve(parse(yaml.safe_dump(data), base=folder))
