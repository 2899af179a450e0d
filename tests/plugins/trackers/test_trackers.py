"""Trackers: each shows what a run gives it; one that fails costs the run nothing."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from cvx_core import CvxError, RecipeError
from cvx_core.recipe import parse
from cvx_core.run import run
from cvx_core.spec import resolve
from cvx_core.testing.plugin import suite
from cvx_io.video_write import write_mp4
from cvx_plugins import trackers
from cvx_plugins.tasks.tracking import Tracking
from cvx_plugins.trackers.tensorboard import Tensorboard
from tests.plugins.tasks.conftest import TINY

test_the_package_conforms = suite("trackers")


class Video:
    def __init__(self, path, format):
        self.path = path


class Shown:
    """A stand-in for a tracking package: it keeps what it is given."""

    Video = Video

    def __init__(self):
        self.started, self.logged, self.finished, self.fails = [], [], 0, False

    def init(self, **given):
        self.started.append(given)
        return SimpleNamespace(id=f"id{len(self.started)}", log=self.log, finish=self.finish)

    def log(self, values, step):
        if self.fails:
            raise ConnectionError("no network")
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def recipe(tmp_path):
    """A run of two steps of one small picture each, tracked by those named."""

    def made(*names, **task):
        data = yaml.safe_load(TINY)
        data |= {"output": str(tmp_path / "run"), "name": "two steps"}
        data |= {"video": {"frames": 1, "height": 32, "width": 32, "fps": 8}, "loader": {"batch": 1}}
        data["task"] |= {"steps": 2, "trackers": [{"use": name} for name in names], **task}
        return resolve(parse(yaml.safe_dump(data)))

    return made


@pytest.fixture(params=["wandb", "trackio"])
def shown(request, monkeypatch):
    """A stand-in in the place of a package, found wherever it is looked for."""
    package = Shown()
    package.name, package.__spec__ = request.param, ModuleSpec(request.param, None)
    monkeypatch.setitem(sys.modules, request.param, package)
    return package


def test_a_run_shows_its_numbers_and_its_recipe_and_goes_on_in_the_same_place(recipe, shown):
    spec = recipe(shown.name, stop_at=1, save_every=1)
    run(spec)
    run(recipe(shown.name, resume="auto"))
    first, second = shown.started
    assert first["config"] == spec.resolved
    assert (first["name"], first["project"], shown.finished) == ("two steps", "cvx", 2)
    assert [step for step, _ in shown.logged] == [1, 2]
    logged = [json.loads(line) for line in (spec.output / "log.jsonl").read_text().splitlines()]
    assert [values["loss"] for _, values in shown.logged] == [line["loss"] for line in logged]
    assert "rows" not in shown.logged[0][1]
    if shown.name == "wandb":
        assert (first["id"], first["resume"], second["id"], second["resume"]) == (None, None, "id1", "allow")
        assert first["mode"] == "online"
    else:
        assert (first["resume"], second["resume"], first["space_id"]) == ("never", "allow", None)


def test_a_tracker_that_fails_is_counted_and_the_run_ends_well(recipe, shown, caplog):
    shown.fails = True
    run(recipe(shown.name))
    assert (recipe().output / "checkpoints/step-00000002/manifest.json").exists()
    told = [record.message for record in caplog.records if record.message.startswith("tracker")]
    assert told == [
        f"tracker {shown.name!r}: ConnectionError: no network; the run goes on",
        f"tracker {shown.name!r} failed 2 times; log.jsonl has everything",
    ]


def test_a_tracker_that_cannot_start_ends_the_run_before_its_first_step(recipe, shown, monkeypatch):
    def refuse(**_given):
        raise PermissionError("no key")

    monkeypatch.setattr(shown, "init", refuse, raising=False)
    with pytest.raises(
        CvxError, match=rf"tracker '{shown.name}' cannot start: PermissionError: no key\. Mend"
    ):
        run(recipe(shown.name))
    assert not (recipe().output / "checkpoints").exists()


def test_a_video_is_given_by_its_file(recipe, shown, tmp_path):
    spec = recipe(shown.name)
    tracking = Tracking(spec.config("task").trackers, spec, 0)
    tracking.video(3, "validation/videos", tmp_path / "grid.mp4")
    [(step, values)] = shown.logged
    assert (step, values["validation/videos"].path) == (3, str(tmp_path / "grid.mp4"))


def test_tensorboard_has_numbers_and_videos(recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec = recipe("tensorboard")
    frames = np.zeros((3, 16, 24, 3), np.uint8)
    frames[1:] = 200
    write_mp4(tmp_path / "grid.mp4", frames, 8)
    tracking = Tracking(spec.config("task").trackers, spec, 0)
    tracking.scalars(1, {"loss": 0.5, "rows": ["a"], "seconds": 2.0})
    tracking.video(1, "validation/videos", tmp_path / "grid.mp4")
    tracking.close()
    events = EventAccumulator(str(spec.output / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss", "seconds"]
    assert events.Scalars("loss")[0].value == 0.5
    [image] = events.Images("validation/videos")
    assert (image.step, image.width, image.height, image.encoded_image_string[:3]) == (1, 24, 16, b"GIF")


def test_tensorboard_leaves_videos_out_where_that_is_asked_for(recipe, tmp_path):
    spec = recipe()
    tracker = Tensorboard(trackers.TensorboardConfig(videos=False), SimpleNamespace(spec=spec))
    tracker.start(0)
    tracker.video(1, "validation/videos", tmp_path / "missing.mp4")
    tracker.close()


def test_tensorboard_is_the_default_and_an_empty_list_is_none(tmp_path):
    data = yaml.safe_load(TINY)
    del data["task"]["trackers"]
    stated = resolve(parse(yaml.safe_dump(data)))
    assert [tracker.name for tracker in stated.config("task").trackers] == ["tensorboard"]
    assert stated.resolved["task"]["trackers"] == [{"use": "tensorboard", "videos": True}]
    again = resolve(parse(stated.to_yaml()))
    assert again.resolved == stated.resolved
    assert resolve(parse(TINY)).config("task").trackers == ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"use": "tensorboards"}], "no tracker 'tensorboards'. Did you mean 'tensorboard'?"),
        ([{"use": "tensorboard", "video": True}], "no such field. Did you mean 'videos'?"),
        ([{"use": "tensorboard"}, {"use": "tensorboard"}], "'tensorboard' is named twice. Keep one."),
        (True, "got True; expected a list of mappings with `use:`"),
        ([{"use": "absent"}], "needs a package. Run `pip install wandb`"),
    ],
)
def test_what_cannot_be_is_said_at_the_check(value, message, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    data = yaml.safe_load(TINY)
    data["task"]["trackers"] = [{"use": "wandb"}] if "wandb" in message else value
    with pytest.raises(RecipeError) as caught:
        resolve(parse(yaml.safe_dump(data)))
    assert message in str(caught.value)


@pytest.mark.slow
def test_the_real_wandb_takes_a_run_without_a_network(recipe):
    pytest.importorskip("wandb", reason="wandb is not installed")
    spec = recipe()
    chosen = resolve(
        parse(
            yaml.safe_dump(
                {
                    **spec.resolved,
                    "task": {**spec.resolved["task"], "trackers": [{"use": "wandb", "mode": "offline"}]},
                }
            )
        )
    )
    run(chosen)
    assert list((spec.output / "wandb").glob("offline-run-*/run-*.wandb"))
