"""Features encoded once: training on them is training on the clips; only what changed is encoded again."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from cvx_core import CvxError, FormatError, RecipeError
from cvx_core.building import build
from cvx_core.interfaces import Features
from cvx_core.placing import place
from cvx_core.random import Draws
from cvx_core.recipe import parse
from cvx_core.spec import resolve
from cvx_io import atomic
from cvx_io.cache import __main__ as command
from cvx_io.cache.items import items_in
from cvx_io.video_write import write_mp4
from cvx_plugins.plan.figures import planned
from cvx_plugins.tasks import origins, precompute
from cvx_plugins.tasks.rows import make_loader


def clip(path: Path, seed: int, frames: int = 12) -> None:
    """Write a clip of its own, from a seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), np.uint8)
    video = np.kron(
        np.stack([np.roll(pixels, i, 1) for i in range(frames)]), np.ones((1, 16, 16, 1), np.uint8)
    )
    write_mp4(path, video, 8)


@pytest.fixture
def clips(tmp_path):
    """Clips of two folders, two of the same name and two of the same content; returns their index file."""
    folder = tmp_path / "data"
    clip(folder / "a/one.mp4", 1)
    clip(folder / "b/one.mp4", 2)
    clip(folder / "a/two.mp4", 3)
    shutil.copy(folder / "a/two.mp4", folder / "b/again.mp4")
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(folder / "a/two.png")
    records = [
        {"file": "a/one.mp4", "captions": ["a first clip", "it has two captions"]},
        {"file": "b/one.mp4", "captions": "a second clip"},
        {"file": "a/two.mp4", "captions": "a third clip", "image": "a/two.png"},
        {"file": "b/again.mp4", "captions": "a third clip"},
    ]
    return index(folder / "data.jsonl", records)


def index(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def recipes(tiny, clips, tmp_path):
    """Recipes of the same run: to precompute, and to train from the cache or the clips."""
    tiny["dataset"] = {"use": "jsonl", "path": str(clips)}
    tiny["task"] |= {"steps": 3, "text_dropout": 0.4}

    def go(**changes):
        online = {**tiny, **changes, "output": str(tmp_path / "online")}
        named = {k: v for k, v in online.items() if k not in ("loader", "optimizer")}
        made = {**named, "task": {"use": "precompute"}, "output": str(tmp_path / "cache")}
        dataset = {"use": "feature-cache", "path": str(tmp_path / "cache")}
        cached = {**online, "dataset": dataset, "output": str(tmp_path / "cached")}
        return made, cached, online

    return go


def encoded(folder: Path) -> dict[str, int]:
    """Return what the last run had to encode, of the kinds it had to."""
    account = json.loads((folder / "precompute.json").read_text())
    return {kind: count for kind, count in account["encoded"].items() if count}


def why(folder: Path) -> dict[str, dict[str, int]]:
    account = json.loads((folder / "precompute.json").read_text())
    return {kind: reasons for kind, reasons in account["why"].items() if reasons}


I2V = {"card": {"image_latent": "scaled"}, "image_condition": True}


@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
def test_training_from_the_cache_is_training_from_the_clips_bit_for_bit(
    recipes, tiny, launch, monkeypatch, image
):
    if image:
        tiny["predictor"] |= I2V
        tiny["task"] |= {"image_noise": None, "image_dropout": 0.3}
    made, cached, online = recipes()
    folder = launch(made)
    texts = 5  # two of the first clip, one each of two others, and none at all
    assert encoded(folder) == {"latent": 3, "text": texts} | ({"image_latent": 4} if image else {})
    expected = (launch(online) / "log.jsonl").read_bytes()
    real = place
    built = []
    monkeypatch.setattr("cvx_core.placing.place", lambda *a: built.append(real(*a)) or built[-1])
    assert (launch(cached) / "log.jsonl").read_bytes() == expected
    assert (built[-1].autoencoder, built[-1].text_encoder) == (None, None)
    assert built[-1].predictor is not None
    elsewhere = {"output": str(folder.parent / "again"), "loader.workers": 1}
    launch(cached, **elsewhere, **{"task.stop_at": 2})
    again = launch(cached, **elsewhere, **{"task.resume": "auto"})
    assert (again / "log.jsonl").read_bytes() == expected
    log = [json.loads(line) for line in expected.splitlines()]
    assert len({line["loss"] for line in log}) == 3


def test_every_feature_is_that_of_the_clips(recipes, launch):
    """Of both captions, too, and of clips whose files have one name."""
    made, cached, online = recipes()
    launch(made)

    def features(data) -> list[Features]:
        spec = resolve(parse(yaml.safe_dump(data)))
        parts = place(build(spec), spec)
        batches = list(make_loader(parts, spec).iterate(epochs=4))
        return [parts.encoder(batch, Draws(0, i, (0, 1))) for i, (_, batch) in enumerate(batches)]

    pairs = list(zip(features(cached), features(online), strict=True))
    assert all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True) if a is not None)
    first, second = {}, {}
    for row in resolve(parse(yaml.safe_dump(cached))).choices["dataset"].build(None).rows():
        (first if "/a/" in str(row.meta) else second)[row.id] = row.features
    one, other = first["a/one.mp4#1"], second["b/one.mp4#2"]
    assert not torch.equal(one("a first clip").video.mean, other("a second clip").video.mean)


def test_an_edit_encodes_exactly_what_it_touches_and_says_why(recipes, tiny, clips, launch, tmp_path):
    tiny["predictor"] |= I2V
    tiny["task"] |= {"image_noise": None}
    made, cached, _ = recipes()
    folder = launch(made)
    before = {path: path.stat().st_mtime_ns for _, path in items_in(folder)}
    assert len(before) == 12

    def after(**changes) -> dict[str, int]:
        launch({**made, **changes})
        return encoded(folder)

    assert after() == {}
    assert before == {path: path.stat().st_mtime_ns for _, path in items_in(folder)}

    clip(clips.parent / "a/one.mp4", 9)
    with pytest.raises(FormatError, match=r"row 'a/one.mp4#1': .*a/one.mp4 changed\nRun the precompute task"):
        launch(cached)
    assert after() == {"latent": 1, "image_latent": 1}
    assert why(folder) == {kind: {"clip changed": 1} for kind in ("latent", "image_latent")}

    Image.fromarray(np.full((48, 64, 3), 10, np.uint8)).save(clips.parent / "a/two.png")
    assert after() == {"image_latent": 1}
    assert why(folder) == {"image_latent": {"image changed": 1}}

    clips.write_text(clips.read_text().replace("a second clip", "another caption"))
    with pytest.raises(FormatError, match=r"data.jsonl changed: rows or captions may be others"):
        launch(cached)
    assert after() == {"text": 1}
    assert why(folder) == {"text": {"caption changed": 1}}

    taller = {**tiny["video"], "height": 48}
    with pytest.raises(FormatError, match=r"stale.*\n  video.height 32 -> 48\n"):
        launch({**cached, "video": taller})
    assert after(video=taller) == {"latent": 3, "image_latent": 4}
    assert why(folder)["latent"] == {"video.height 32 -> 48": 3}
    assert after(video={**taller, "fps": 4, "frames": 5}) == {
        "latent": 3,
        "image_latent": 3,
    }  # not the image's

    none = {**tiny["text_encoder"], "unconditional": "zeros"}
    launch(made)
    with pytest.raises(FormatError, match=r"text_encoder.unconditional empty -> zeros"):
        launch({**cached, "text_encoder": none})
    assert after(text_encoder=none) == {"text": 1}

    decoding = {**tiny["autoencoder"], "decode_chunk": 3, "scale_factor": 2.0, "slicing": True}
    assert after(autoencoder=decoding) == {}  # back to the empty prompt, which is still there, and no latent
    assert after(dtype="bfloat16") == {"latent": 3, "image_latent": 4, "text": 5}
    assert why(folder)["text"] == {"dtype float32 -> bfloat16": 5}
    assert after(dataset={**made["dataset"]}) == {}


def test_other_weights_encode_what_they_encode_and_the_same_elsewhere_nothing(
    recipes, tiny, launch, tmp_path
):
    tiny["task"] |= {"export": {"use": "hf"}, "export_whole": True, "steps": 1}
    model = launch(recipes()[2]) / "model"
    tiny["task"] |= {"export": None, "export_whole": False}
    tiny["autoencoder"] |= {"weights": {"use": "hf", "path": str(model / "vae")}}
    made, cached, _ = recipes()
    folder = launch(made)
    moved = shutil.copytree(model / "vae", tmp_path / "moved")
    made["autoencoder"] = {**tiny["autoencoder"], "weights": {"use": "hf", "path": str(moved)}}
    launch(made)
    assert encoded(folder) == {}
    [file] = moved.glob("*.safetensors")
    tensors = load_file(file)
    tensors["encoder.conv_in.conv.bias"][0] += 0.5
    save_file(tensors, file)
    with pytest.raises(FormatError, match=r"stale.*\n  autoencoder weights changed\nRun"):
        launch({**cached, "autoencoder": made["autoencoder"]})
    launch(made)
    assert encoded(folder) == {"latent": 3}
    assert why(folder) == {"latent": {"autoencoder weights changed": 3}}
    launch({**cached, "autoencoder": made["autoencoder"]})


def test_another_version_of_the_code_encodes_all_again(recipes, launch, monkeypatch):
    made, cached, _ = recipes()
    folder = launch(made)
    monkeypatch.setattr(origins, "CODE", origins.CODE + 1)
    with pytest.raises(FormatError, match=r"stale.*\n  .*code"):
        launch(cached)
    launch(made)
    assert encoded(folder) == {"latent": 3, "text": 5}
    assert all("code" in reason for kind in why(folder).values() for reason in kind)
    launch(cached)


def test_recipes_need_not_state_the_encoders_to_train_from_a_cache(recipes, launch, log_of):
    made, cached, _ = recipes()
    launch(made)
    whole = log_of(launch(cached, output=str(Path(cached["output"]) / "a")))
    bare = {k: v for k, v in cached.items() if k not in ("text_encoder", "autoencoder")}
    assert log_of(launch(bare)) == whole
    other = {**bare, "predictor": {**bare["predictor"], "text_length": 17}}
    with pytest.raises(FormatError, match="max_length 16, but predictor 'cogvideox' needs 17"):
        launch(other)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": {"memory": True}}, "task.memory: dataset 'feature-cache' is encoded already"),
        ({"predictor": I2V}, "task.image_noise: is added to pixels"),
        ({"reader": {"use": "pyav"}}, "dataset.use: decodes nothing, so the recipe's reader has no effect"),
        (
            {"task": {"export": {"use": "hf"}, "export_whole": True}},
            "export_whole: dataset 'feature-cache' leaves no",
        ),
        ({"loader": {"rows": 1}}, "has no such field"),
    ],
)
def test_what_has_no_effect_with_a_cache_is_refused(recipes, launch, changes, says):
    made, cached, _ = recipes()
    Path(made["output"]).mkdir()
    with pytest.raises(RecipeError) as error:
        launch({**cached, **{name: {**cached.get(name, {}), **more} for name, more in changes.items()}})
    assert says in str(error.value)


def test_tasks_that_need_clips_refuse_a_cache_and_precompute_refuses_a_random_start(recipes, launch):
    made, cached, _ = recipes()
    Path(made["output"]).mkdir()
    with pytest.raises(RecipeError, match="task 'precompute' needs clips, not what was made of them"):
        launch({**made, "dataset": cached["dataset"]})
    with pytest.raises(RecipeError, match=r"video.start must be 'first' or 'center'"):
        launch({**made, "video": {**made["video"], "start": "random"}})
    with pytest.raises(RecipeError, match=r"'tp' has no effect. Use ddp"):
        launch({**made, "parallel": [{"use": "tp", "size": 2}]})


def test_a_folder_without_the_list_is_named(recipes, launch):
    made, cached, _ = recipes()
    Path(made["output"]).mkdir()
    with pytest.raises(FormatError, match=r"cache: no list of rows 'all'. Run the precompute task"):
        launch(cached)
    launch(made, **{"task.rows": "mine"})
    with pytest.raises(FormatError, match=r"no list of rows 'all'. It has: mine"):
        launch(cached)


def test_two_lists_share_their_items(recipes, tiny, clips, launch):
    made, cached, _ = recipes()
    folder = launch(made)
    few = index(clips.with_name("few.jsonl"), [{"file": "a/two.mp4", "captions": "a third clip"}])
    launch({**made, "dataset": {"use": "jsonl", "path": str(few)}}, **{"task.rows": "few"})
    assert encoded(folder) == {}
    assert command.main(["prune", str(folder)]) == 0
    launch(cached)


def test_unreadable_rows_are_all_named_and_the_work_on_the_others_is_kept(recipes, clips, launch):
    made, cached, _ = recipes()
    (clips.parent / "a/two.mp4").write_bytes(b"no clip")
    clip(clips.parent / "b/one.mp4", 4, frames=3)
    with pytest.raises(FormatError) as error:
        launch(made)
    text, folder = str(error.value), Path(made["output"])
    assert "row 'a/two.mp4#3'" in text
    assert "row 'b/one.mp4#2'" in text
    assert "2 items could not be made; all others are kept" in text
    assert sum(1 for _ in items_in(folder)) == 2 + 5
    launch(made, **{"task.unreadable": "skip"})
    account = json.loads((folder / "precompute.json").read_text())
    assert account["left_out"] == ["b/one.mp4#2", "a/two.mp4#3"]
    assert account["rows"] == 2
    clip(clips.parent / "a/two.mp4", 3)
    clip(clips.parent / "b/one.mp4", 2)
    launch(made)
    assert encoded(folder)["latent"] <= 2
    launch(cached)


def test_latents_that_are_not_finite_are_refused(recipes, tiny, launch, monkeypatch):
    made, _, _ = recipes()
    real = precompute.Encoder.moments
    monkeypatch.setattr(
        precompute.Encoder, "moments", lambda self, v: [real(self, v)[0]._replace(mean=v / 0)]
    )
    with pytest.raises(
        FormatError, match=r"row 'a/one.mp4#1': latent: \d+ of \d+ values of mean are not finite"
    ):
        launch(made)


def test_an_end_in_the_middle_keeps_what_is_complete(recipes, launch, monkeypatch):
    made, cached, _ = recipes()
    real, count = precompute.write_item, []

    def write(*args):
        count.append(args)
        if len(count) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(precompute, "write_item", write)
    with pytest.raises(KeyboardInterrupt):
        launch(made)
    monkeypatch.setattr(precompute, "write_item", real)
    folder = launch(made)
    assert sum(encoded(folder).values()) == 8 - 4
    launch(cached)


def test_a_full_disk_ends_the_run_in_words_and_keeps_what_is_complete(recipes, launch, monkeypatch):
    made, _, _ = recipes()
    folder, real, count = Path(made["output"]), atomic._sync, []

    def sync(path):
        count.append(path)
        if "text" in str(path) and len(list(items_in(folder))) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path)

    monkeypatch.setattr(atomic, "_sync", sync)
    with pytest.raises(
        CvxError, match=r"cannot be written: No space left on device. All other items are kept"
    ):
        launch(made)
    monkeypatch.setattr(atomic, "_sync", real)
    assert not list(folder.rglob("*.partial"))
    launch(made)
    assert sum(encoded(folder).values()) == 8 - 3


@pytest.mark.slow
def test_two_processes_share_the_work_and_one_goes_on_when_the_other_is_killed(
    recipes, clips, launch, tmp_path
):
    records = [{"file": "a/one.mp4", "captions": f"caption {i}"} for i in range(60)]
    records += json.loads(f"[{','.join(clips.read_text().splitlines())}]")
    index(clips, records)
    made, cached, _ = recipes()
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(made))
    folder, run = Path(made["output"]), [sys.executable, "-m", "cvx_core.run", str(recipe)]
    first = subprocess.Popen(run, stdout=subprocess.DEVNULL)
    second = subprocess.Popen(run, stdout=subprocess.PIPE, text=True)
    while sum(1 for _ in items_in(folder)) < 8 and first.poll() is None:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    out, _ = second.communicate(timeout=120)
    first.wait()
    assert second.returncode == 0, out
    assert sum(1 for _ in items_in(folder)) == 3 + 65
    assert command.main(["verify", str(folder)]) == 0
    assert command.main(["prune", str(folder)]) == 0
    assert not list(folder.rglob("*.partial"))
    launch(cached)


def test_the_command_finds_damage_counts_and_prunes(recipes, tiny, launch, capsys):
    made, cached, _ = recipes()
    folder = launch(made)
    launch({**made, "video": {**tiny["video"], "height": 48}})
    capsys.readouterr()
    assert command.main(["stats", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["items"]["latent"], found["unused"], found["rows"]) == (6, 3, {"all": 4})
    assert command.main(["prune", str(folder), "--dry-run"]) == 0
    assert "3 files" in capsys.readouterr().out
    assert command.main(["prune", str(folder)]) == 0
    launch({**made, "video": {**tiny["video"], "height": 48}})
    assert encoded(folder) == {}
    items = [path for _, path in items_in(folder)]
    data = bytearray(items[0].read_bytes())
    data[-5] ^= 1
    items[0].write_bytes(data)
    items[1].write_bytes(items[1].read_bytes()[:-3])
    items[2].unlink()
    assert command.main(["verify", str(folder), "--remove"]) == 1
    out = capsys.readouterr()
    assert "7 items, 2 damaged (removed), 1 missing" in out.out
    assert "its tensors are not those that were written" in out.err
    with pytest.raises(FormatError, match="Run precompute again"):
        launch({**cached, "video": {**tiny["video"], "height": 48}})
    launch({**made, "video": {**tiny["video"], "height": 48}})
    assert why(folder) == {"latent": {"its file is missing": 3}}
    assert command.main(["verify", str(folder)]) == 0
    assert command.main(["stats", str(folder.parent / "nowhere")]) == 2
    assert "is no feature cache" in capsys.readouterr().err


def test_a_plan_of_training_from_a_cache_holds_no_encoders(recipes):
    _, cached, online = recipes()
    Path(cached["dataset"]["path"]).mkdir()
    held = []
    for data in (cached, online):
        plan = {**data, "task": {"use": "plan"}}
        [stage] = planned(resolve(parse(yaml.safe_dump(plan)))).stages
        held.append((stage.encoders, stage.encoding))
    assert held[0] == (0, 0)
    assert min(held[1]) > 0
