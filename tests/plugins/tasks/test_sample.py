"""Sampling: files, records, repeatability and refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cvx_core import CvxError, FormatError, RecipeError
from cvx_io.video_write import read_metadata

PROMPTS = ["a red circle", "a blue square", "a red circle"]


@pytest.fixture
def sampling(tiny, launch, tmp_path):
    """A sampling recipe of a model that was trained for a moment."""
    tiny["task"] |= {"steps": 1, "export": {"use": "hf"}, "export_whole": True}
    model = launch(tiny, output=str(tmp_path / "trained")) / "model"
    return {
        "model": str(model),
        "device": "cpu",
        "output": str(tmp_path / "out"),
        "video": {"frames": 9, "height": 32, "width": 48, "fps": 8},
        "dataset": {"use": "prompts", "prompts": PROMPTS},
        "text_encoder": {"tokenizer": "bytes"},
        "task": {"use": "sample", "steps": 3, "guidance": 2.0, "save_latents": True},
    }


def test_every_prompt_gives_a_video_with_its_record(sampling, launch):
    out = launch(sampling, **{"task.formats": ["mp4", "gif", "png"], "task.sheet": True})
    names = ["0000-a-red-circle", "0001-a-blue-square", "0002-a-red-circle"]
    for number, name in enumerate(names):
        record = json.loads((out / f"{name}.json").read_text())
        assert record == read_metadata(out / f"{name}.mp4")
        assert (record["prompt"], record["seed"], record["steps"]) == (PROMPTS[number], number, 3)
        assert record["digest"]
        assert (out / f"{name}.gif").exists()
    assert Image.open(out / "sheet.png").height > Image.open(out / f"{names[0]}.png").height


def test_a_repeated_run_skips_what_is_there_and_another_recipe_is_refused(sampling, launch):
    out = launch(sampling)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    launch(sampling)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    with pytest.raises(FormatError, match=r"made by another recipe .* task\.overwrite=true"):
        launch(sampling, **{"task.guidance": 3.0})
    launch(sampling, **{"task.guidance": 3.0, "task.overwrite": True})


def test_a_video_does_not_depend_on_its_batch(sampling, launch, tmp_path):
    alone = launch(sampling, **{"scheduler.use": "dpm"})
    together = launch(sampling, output=str(tmp_path / "b"), **{"scheduler.use": "dpm", "task.batch": 3})
    for path in alone.glob("*.safetensors"):
        a, b = load_file(path)["latent"], load_file(together / path.name)["latent"]
        assert torch.allclose(a, b, atol=1e-5)
    a, b = (
        load_file(alone / f"{n}.safetensors")["latent"] for n in ("0000-a-red-circle", "0002-a-red-circle")
    )
    assert not torch.allclose(a, b, atol=0.1), "another number is another seed"


def test_noise_of_the_wrong_shape_is_refused(sampling, launch, tmp_path):
    from safetensors.torch import save_file

    save_file({"0": torch.zeros(4, 2, 4, 6)}, tmp_path / "n.safetensors")
    with pytest.raises(FormatError, match=r"noise 0 is \[4, 2, 4, 6\], expected \[4, 3, 4, 6\]"):
        launch(sampling, **{"task.initial_noise": str(tmp_path / "n.safetensors")})


def test_images_for_a_text_to_video_model_are_refused(sampling, launch, tmp_path):
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(tmp_path / "i.png")
    sampling["dataset"] |= {"prompts": ["a"], "images": [str(tmp_path / "i.png")]}
    with pytest.raises(CvxError, match="text-to-video"):
        launch(sampling)


def test_weights_that_make_no_sense_stop_before_a_video_is_written(sampling, launch, tmp_path):
    from safetensors.torch import save_file

    [file] = (tmp_path / "trained/model/transformer").glob("*.safetensors")
    broken = {name: torch.full_like(t, float("nan")) for name, t in load_file(file).items()}
    save_file(broken, file)
    with pytest.raises(CvxError, match="no longer finite after step 1 of 3"):
        launch(sampling)
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_a_model_without_weights_does_not_sample(tiny, launch):
    del tiny["loader"], tiny["optimizer"]
    tiny["task"] = {"use": "sample"}
    with pytest.raises(RecipeError, match="has no weights"):
        launch(tiny)


def test_evaluate_reports_every_band_and_the_reconstruction(sampling, launch, tmp_path):
    data = {**sampling, "task": {"use": "evaluate", "bands": 4, "rows": 3}, "loader": {"batch": 2}}
    data["dataset"] = {"use": "synthetic", "rows": 5}
    result = json.loads((launch(data) / "evaluation.json").read_text())
    again = json.loads((launch(data, output=str(tmp_path / "again")) / "evaluation.json").read_text())
    assert [(b["from"], b["to"]) for b in result["bands"]] == [(0, 250), (250, 500), (500, 750), (750, 1000)]
    assert result["rows"] == 3
    assert result["psnr"] > 0
    assert result["bands"] == again["bands"]
