"""Validation while a predictor trains: its figures, when it happens, and that training does not notice."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cvx_core import CvxError, RecipeError
from cvx_core.recipe import parse
from cvx_core.spec import resolve
from cvx_io.video_grid import read_mp4
from cvx_plugins.tasks import validation_videos
from cvx_plugins.tasks.held_out import HeldOut
from cvx_plugins.tasks.sampling import Sampler
from cvx_plugins.tasks.validation import Validation
from tests.plugins.tasks.test_train import same, state_of

LOSS = {"dataset": {"use": "synthetic", "rows": 3, "seed": 1}, "bands": 2}
PROMPTS = {"use": "prompts", "prompts": ["a red circle", "a ring"]}
VIDEOS = {"dataset": PROMPTS, "steps": 2, "guidance": 2.0}
LORA = {"use": "lora", "rank": 2}


@pytest.fixture
def tiny(tiny):
    """Images, one at a time, with both halves of a validation after every second step."""
    tiny |= {"video": {"frames": 1, "height": 32, "width": 32, "fps": 8}, "loader": {"batch": 1}}
    tiny["text_encoder"]["max_length"] = tiny["predictor"]["text_length"] = 64
    tiny["task"] |= {"validation": {"every": 2, "loss": LOSS, "videos": VIDEOS}}
    return tiny


@pytest.fixture
def validations(log_of):
    """Return {step: line} of the validations in a run's log, each of which is there once."""

    def found(folder):
        lines = [line for line in log_of(folder) if "validation/failed" in line]
        steps = [line["step"] for line in lines]
        assert steps == sorted(set(steps))
        return dict(zip(steps, lines, strict=True))

    return found


def trained(folder, step=4):
    return state_of(folder / f"checkpoints/step-{step:08d}")


@pytest.fixture
def frames(monkeypatch):
    """Return the frames of a video as they were written, for an encoder loses some of it."""
    kept = {}
    writes = validation_videos.write_mp4

    def noted(path, video, *more):
        kept[path] = video
        writes(path, video, *more)

    monkeypatch.setattr(validation_videos, "write_mp4", noted)

    def found(folder, name, number=0):
        [path] = (folder / "validation" / name).glob(f"{number:04d}-*.mp4")
        return kept[path]

    return found


def test_training_is_bit_for_bit_what_it_is_without(tiny, launch, tmp_path, log_of, validations):
    tiny["adapter"] = {**LORA, "dropout": 0.5}
    tiny["task"]["ema"] = {"decay": 0.5}
    looked = launch(tiny, output=str(tmp_path / "looked"))
    del tiny["task"]["validation"]
    plain = launch(tiny, output=str(tmp_path / "plain"))
    assert list(validations(looked)) == [0, 2, 4]
    assert same(trained(looked), trained(plain))
    assert [line for line in log_of(looked) if "loss" in line] == log_of(plain)


def test_the_loss_is_what_evaluate_measures_with_the_average_where_one_is_kept(
    tiny, launch, tmp_path, validations
):
    tiny["task"]["ema"] = {"decay": 0.5, "warmup": False}
    tiny["task"] |= {"export": {"use": "hf"}, "export_whole": True}
    del tiny["task"]["validation"]["videos"]
    folder = launch(tiny, output=str(tmp_path / "train"))
    found = validations(folder)
    assert {line["validation/weights"] for line in found.values()} == {"average"}
    assert len({line["validation/loss"] for line in found.values()}) == 3
    evaluate = {
        **{name: tiny[name] for name in ("device", "video", "loader")},
        "model": str(folder / "model"),
        "text_encoder": {"tokenizer": "bytes", "max_length": 64},
        "dataset": LOSS["dataset"],
        "task": {"use": "evaluate", "bands": 2},
    }
    measured = json.loads((launch(evaluate, output=str(tmp_path / "e")) / "evaluation.json").read_text())
    assert found[4]["validation/loss"] == pytest.approx(measured["loss"], rel=1e-6)
    bands = [found[4][f"validation/loss_band_{band}"] for band in (0, 1)]
    assert bands == pytest.approx([band["loss"] for band in measured["bands"]], rel=1e-6)


def test_the_base_stands_beside_the_trained_model(tiny, launch, frames):
    tiny["optimizer"]["lr"] = 0.05
    folder = launch(tiny)
    base, first, last = (frames(folder, name) for name in ("base", "step-000000", "step-000004"))
    assert np.array_equal(base, first)
    assert not np.array_equal(base, last)
    grid, fps = read_mp4(folder / "validation/step-000004.mp4")
    assert grid.shape[1] > 2 * 160
    assert grid.shape[2] > 2 * 160
    assert fps == 8
    assert (
        json.loads((folder / "validation/step-000004.json").read_text())["prompt"] == "base | trained, step 4"
    )
    record = json.loads((next((folder / "validation/base").glob("0001*.json"))).read_text())
    assert (record["prompt"], record["seed"], record["steps"]) == ("a ring", 1, 2)


def test_the_base_of_a_lora_is_sampled_without_it_at_any_time(tiny, launch, tmp_path, frames):
    tiny["adapter"], tiny["optimizer"]["lr"] = LORA, 0.1
    whole = launch(tiny, output=str(tmp_path / "whole"))
    tiny["task"]["save_every"] = 1
    del tiny["task"]["validation"]["videos"]
    late = launch(tiny, output=str(tmp_path / "late"), **{"task.stop_at": 3})
    tiny["task"]["validation"]["videos"] = VIDEOS
    launch(tiny, output=str(late), **{"task.resume": "auto"})
    assert np.array_equal(frames(late, "base"), frames(whole, "base"))
    assert np.array_equal(frames(late, "step-000004"), frames(whole, "step-000004"))
    assert not np.array_equal(frames(late, "step-000004"), frames(late, "base"))


def test_a_full_fine_tune_that_lost_its_base_says_so(tiny, launch, caplog):
    tiny["task"]["save_every"] = 1
    folder = launch(tiny, **{"task.stop_at": 3})
    kept = [path.read_bytes() for path in sorted((folder / "validation/base").iterdir())]
    launch(tiny, **{"task.resume": "auto"})
    assert [path.read_bytes() for path in sorted((folder / "validation/base").iterdir())] == kept
    assert "has not the base's videos" not in caplog.text
    wide = read_mp4(folder / "validation/step-000004.mp4")[0].shape[2]
    tiny["task"]["validation"]["videos"] = {**VIDEOS, "steps": 3}
    launch(tiny, **{"task.resume": "auto", "task.steps": 5})
    assert (
        "has not the base's videos of these prompts and settings, and the weights are those of step 4"
        in caplog.text
    )
    assert read_mp4(folder / "validation/step-000005.mp4")[0].shape[2] < wide


@pytest.mark.parametrize(
    ("every", "at_start", "expected"), [(2, True, [0, 2, 4, 5]), (9, False, [5]), (5, True, [0, 5])]
)
def test_it_is_due_every_so_many_steps_and_after_the_last(every, at_start, expected, tiny):
    validation = Validation.__new__(Validation)
    tiny["task"]["validation"] |= {"every": every, "at_start": at_start}
    config = resolve(parse(yaml.safe_dump(tiny))).config("task").validation
    validation._config, validation._last, validation._done = config, 5, None
    assert [step for step in range(6) if validation.is_due(step)] == expected
    validation._done = 5
    assert not validation.is_due(5)


def test_a_resume_neither_repeats_nor_loses_one(tiny, launch, validations, monkeypatch, tmp_path):
    tiny["task"] |= {"save_every": 1, "keep": 9}
    del tiny["task"]["validation"]["videos"]
    whole = validations(launch(tiny, output=str(tmp_path / "whole")))
    folder = launch(tiny, **{"task.stop_at": 2})
    assert list(validations(folder)) == [0, 2]
    launch(tiny, **{"task.stop_at": 3, "task.resume": "auto"})
    assert validations(folder) == {step: whole[step] for step in (0, 2)}

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # between a save and the validation after it
        patch.setattr(HeldOut, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            launch(tiny, **{"task.resume": "auto"})
    assert (folder / "checkpoints/step-00000004/manifest.json").exists()
    assert list(validations(folder)) == [0, 2]
    launch(tiny, **{"task.resume": "auto"})
    assert validations(folder) == whole
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["step"] == 4


def test_what_fails_in_one_video_costs_that_video(tiny, launch, validations, monkeypatch, caplog):
    latents = Sampler.latents

    def bad(self, jobs, on_step, refuse=True):
        found = latents(self, jobs, on_step, refuse)
        return found * float("nan") if jobs[0].prompt == "a ring" else found

    monkeypatch.setattr(Sampler, "latents", bad)
    folder = launch(tiny)
    assert [line["validation/failed"] for line in validations(folder).values()] == [1, 1, 1]
    assert "validation after step 2: 1 went wrong: 0001-a-ring: its latent is not finite" in caplog.text
    assert (folder / "validation/step-000002.mp4").exists()
    assert (folder / "checkpoints/step-00000004/manifest.json").exists()


def test_a_loss_that_is_not_finite_is_counted_and_left_out(tiny, launch, validations, monkeypatch):
    del tiny["task"]["validation"]["videos"]
    monkeypatch.setattr(
        "cvx_plugins.tasks.measure.prediction_loss", lambda *given: torch.tensor([float("inf")])
    )
    found = validations(launch(tiny))
    assert found[4] == {"step": 4, "validation/weights": "trained", "validation/failed": 1}


def test_an_error_in_it_ends_the_run_with_what_was_trained_saved(tiny, launch, monkeypatch, tmp_path):
    measure = HeldOut.measure
    calls = []

    def fails(self):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        return measure(self)

    monkeypatch.setattr(HeldOut, "measure", fails)
    with pytest.raises(MemoryError, match="no room"):
        launch(tiny, output=str(tmp_path / "out"))
    assert (tmp_path / "out/checkpoints/step-00000002/manifest.json").exists()


def test_a_clip_that_is_trained_on_is_not_held_out(tiny, launch):
    tiny["task"]["validation"]["loss"] = {"dataset": {"use": "synthetic", "rows": 9}, "rows": 2}
    with pytest.raises(
        CvxError, match=r"2 of 2 held-out clips are trained on too, such as row .*Take them out"
    ):
        launch(tiny)


def test_rows_from_a_cache_are_validated_without_encoders(tiny, launch, tmp_path, validations):
    del tiny["task"]["validation"]["videos"]
    online = validations(launch(tiny, output=str(tmp_path / "online")))
    caches = {}
    for name, seed in (("rows", 0), ("held", 1)):
        data = {k: v for k, v in tiny.items() if k not in ("loader", "optimizer")}
        rows = {"use": "synthetic", "rows": 6 if name == "rows" else 3, "seed": seed}
        data |= {"dataset": rows, "task": {"use": "precompute"}, "output": str(tmp_path / name)}
        caches[name] = {"use": "feature-cache", "path": str(launch(data))}
    tiny["dataset"] = caches["rows"]
    with pytest.raises(
        RecipeError, match=r"trains on encoded rows of 'feature-cache', and these are clips of"
    ):
        launch(tiny)
    tiny["task"]["validation"]["loss"] = {**LOSS, "dataset": caches["held"]}
    cached = validations(launch(tiny, output=str(tmp_path / "cached")))
    assert cached == online
    tiny["task"]["validation"]["videos"] = VIDEOS
    with pytest.raises(
        RecipeError, match=r"need the text_encoder and the autoencoder, which dataset 'feature-"
    ):
        launch(tiny)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": None, "videos": None}, "validation: has nothing to do. Add `loss`, `videos` or both."),
        ({"loss": {}}, "validation.loss.dataset: is required"),
        ({"loss": {"dataset": {"use": "jsonl"}}}, "validation.loss.dataset.path: is missing"),
        (
            {"loss": {**LOSS, "band": 3}},
            "validation.loss.band: 'loss' has no such field. Did you mean 'bands'?",
        ),
        ({"every": 0}, "validation.every: "),
        (
            {"videos": {**VIDEOS, "dataset": {"use": "prompt"}}},
            "no dataset 'prompt'. Did you mean 'prompts'?",
        ),
    ],
)
def test_what_cannot_be_is_said_at_the_check(tiny, change, message):
    tiny["task"]["validation"] |= change
    with pytest.raises(RecipeError) as caught:
        resolve(parse(yaml.safe_dump(tiny), "r.yaml"))
    assert message in str(caught.value)
    assert "r.yaml:" in str(caught.value)


def test_strategies_and_buckets_that_cannot_be_validated_are_refused(tiny):
    tiny["parallel"] = [{"use": "pp"}]
    with pytest.raises(
        RecipeError, match=r"no rank that can call the whole predictor, which task\.validation"
    ):
        resolve(parse(yaml.safe_dump(tiny)))
    del tiny["parallel"], tiny["video"]
    tiny["loader"] = {"buckets": {"32x32": {1: [1.0, 1]}}}
    with pytest.raises(RecipeError, match=r"are of one size, and loader\.buckets leave none to choose"):
        resolve(parse(yaml.safe_dump(tiny)))


def test_the_resolved_recipe_states_all_of_it_and_runs_again(tiny):
    spec = resolve(parse(yaml.safe_dump(tiny)))
    stated = spec.resolved["task"]["validation"]
    assert stated["loss"]["dataset"] == {"use": "synthetic", "rows": 3, "seed": 1}
    assert (stated["every"], stated["at_start"], stated["videos"]["videos_per_prompt"]) == (2, True, 1)
    assert resolve(parse(spec.to_yaml())).resolved == spec.resolved


def test_a_validation_leaves_mode_and_generator_as_they_were(tiny, launch, monkeypatch):
    states = []
    call = Validation.__call__

    def noted(self, step, what):
        predictor = self._parts.predictor
        before = torch.get_rng_state(), [m.training for m in predictor.modules()]
        result = call(self, step, what)
        states.append((before, (torch.get_rng_state(), [m.training for m in predictor.modules()])))
        return result

    monkeypatch.setattr(Validation, "__call__", noted)
    tiny["adapter"] = {**LORA, "dropout": 0.5}
    launch(tiny, **{"task.steps": 2})
    for (rng, modes), (rng_after, modes_after) in states:
        assert torch.equal(rng, rng_after)
        assert modes == modes_after
        assert all(modes)


def test_image_to_video_prompts_need_images(tiny, launch):
    tiny["predictor"]["image_condition"] = True
    with pytest.raises(CvxError, match=r"is image-to-video, but 2 rows have no image"):
        launch(tiny)


def test_image_to_video_is_validated_from_images(tiny, launch, tmp_path, frames, validations):
    tiny["predictor"]["image_condition"] = True
    images = []
    for shade in (40, 200):
        images.append(str(tmp_path / f"{shade}.png"))
        Image.fromarray(np.full((32, 32, 3), shade, np.uint8)).save(images[-1])
    tiny["task"]["validation"]["videos"] = {**VIDEOS, "dataset": {**PROMPTS, "images": images}}
    folder = launch(tiny, **{"task.steps": 2})
    assert list(validations(folder)) == [0, 2]
    assert np.array_equal(frames(folder, "base"), frames(folder, "step-000000"))
    assert not np.array_equal(frames(folder, "base"), frames(folder, "base", 1))
    record = json.loads(next((folder / "validation/base").glob("0001*.json")).read_text())
    assert record["image"] == images[1]


def test_encoders_that_made_room_come_back_for_the_videos_and_go_again():
    class Module:
        def __init__(self, device):
            self.device = torch.device(device)

        def parameters(self):
            return iter([SimpleNamespace(device=self.device)])

        def to(self, device):
            self.device = torch.device(device)

    away, there = Module("cpu"), Module("cuda")
    parts = SimpleNamespace(device=torch.device("cuda"), text_encoder=away, autoencoder=there)
    with validation_videos._at_hand(parts):
        assert (away.device.type, there.device.type) == ("cuda", "cuda")
    assert (away.device.type, there.device.type) == ("cpu", "cuda")
