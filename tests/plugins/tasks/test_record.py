"""What a run leaves about itself, however it ends, and that leaving it never ends a run."""

import json
import logging

import av
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from cvx_core import CvxError
from cvx_plugins.tasks import record


def starts_of(folder):
    return json.loads((folder / "environment.json").read_text())["starts"]


def test_a_run_leaves_its_record_and_a_resumed_one_both_starts(tiny, launch):
    out = launch(tiny, **{"task.stop_at": 2})
    assert (out / "report.html").exists()
    launch(tiny, **{"task.resume": "auto"})
    first, second = starts_of(out)
    assert (first["step"], second["step"]) == (0, 2)
    assert second["ended"]["how"] == "Ended and saved"
    assert second["device"] == "cpu"
    assert second["packages"]["torch"]
    text = (out / "report.html").read_text()
    assert "Step 4 of 4. Ended and saved" in text
    assert text.count('<figure class="curve"') == 6
    plugins = json.loads((out / "plugins.json").read_text())["plugins"]
    components = {name: plugin for plugin in plugins for name in plugin["components"]}
    assert {"predictor:cogvideox", "task:train", "dataset:synthetic", "scheduler:ddim"} <= set(components)
    assert components["task:train"]["package"] == "cvx"
    assert components["task:train"]["entry_point"] == "tasks"


def test_clips_are_kept_as_they_were_given(tiny, launch):
    out = launch(tiny)
    [first, _second] = sorted((out / "given").glob("*.mp4"))
    with av.open(str(first)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.stack(frames).shape == (9, 32, 48, 3)
    assert json.loads(first.with_suffix(".json").read_text())["prompt"].startswith("a ")


def test_a_run_that_ends_by_an_error_says_so_in_its_report(tiny, launch, tmp_path):
    tiny["optimizer"]["lr"] = 1e30
    with pytest.raises(CvxError):
        launch(tiny, output=str(tmp_path / "bad"))
    [start] = starts_of(tmp_path / "bad")
    assert start["ended"]["how"].startswith("Ended by an error: step ")
    assert "Ended by an error" in (tmp_path / "bad/report.html").read_text()


def test_a_report_that_cannot_be_written_is_a_warning(tiny, launch, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "write_report", full)
    monkeypatch.setattr(record, "write_mp4", full)
    tiny["task"]["export"] = {"use": "hf"}
    with caplog.at_level(logging.WARNING, "cvx"):
        out = launch(tiny)
    assert (out / "model").is_dir(), "the export comes after the report"
    assert "the report could not be written: OSError: [Errno 28] No space left" in caplog.text
    assert "clips as they are given to the model could not be written" in caplog.text


TASKS = {"sample": {"steps": 2, "guidance": 1.0}, "evaluate": {"bands": 2}}
DATA = {"sample": {"use": "prompts", "prompts": ["a"]}, "evaluate": {"use": "synthetic", "rows": 2}}


@pytest.mark.parametrize("task", TASKS)
def test_tasks_without_checkpoints_leave_the_same_record_a_failed_one_too(task, tiny, launch, tmp_path):
    tiny["task"] |= {"steps": 1, "export": {"use": "hf"}, "export_whole": True}
    model = launch(tiny, output=str(tmp_path / "trained")) / "model"
    data = {
        "model": str(model),
        "device": "cpu",
        "video": tiny["video"],
        "dataset": {"use": "prompts", "prompts": ["a"]}
        if task == "sample"
        else {"use": "synthetic", "rows": 2},
        "text_encoder": {"tokenizer": "bytes"},
        "task": {"use": task, **TASKS[task]},
    }
    good = launch(data, output=str(tmp_path / "good"))
    names = {"recipe.resolved.yaml", "weights.json", "plugins.json", "environment.json", "report.html"}
    assert names <= {path.name for path in good.iterdir()}
    [start] = starts_of(good)
    assert start["ended"]["how"].startswith("Ended, ")
    assert json.loads((good / "weights.json").read_text())["predictor"]["consumed"]
    with pytest.raises(CvxError, match="is the folder of a training run, and this would replace its record"):
        launch(data, output=str(tmp_path / "trained"))
    [file] = (model / "vae").glob("*.safetensors")
    broken = {name: tensor * float("nan") for name, tensor in load_file(file).items()}
    save_file(broken, file)
    with pytest.raises(CvxError):
        launch(data, output=str(tmp_path / "bad"))
    [start] = starts_of(tmp_path / "bad")
    assert start["ended"]["how"].startswith("Ended by an error: ")
    assert names <= {path.name for path in (tmp_path / "bad").iterdir()}
    assert not list((tmp_path / "bad").glob("*.mp4"))
    assert not (tmp_path / "bad/evaluation.json").exists()
