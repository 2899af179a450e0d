"""loader.unreadable: skip - what fails only when it is decoded is left out, counted, and bound by a limit."""

import json
import os
import signal
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from cvx_core import CvxError, RecipeError
from cvx_io import readable
from cvx_plugins.readers.pyav_reader import PyavClip, PyavReader
from tests.faults.clips import damage, list_clips
from tests.io.test_inspection import write_clip, write_sound

VIDEO = {"frames": 5, "height": 32, "width": 48, "fps": 8}
BAD = {
    "damaged": ("unreadable", "damaged.mp4"),
    "empty": ("unreadable", "the file is empty"),
    "cut": ("unreadable", "cut.mp4"),
    "sound": ("unreadable", "has no video stream, only audio"),
    "text": ("unreadable", "text.mp4"),
    "deadly": ("unreadable", "deadly.mp4: crashes the decoder (exit code -9)"),
    "short": ("too short", "has 2 frames at 8 fps; 5 frames at 8 fps need 5"),
    "one": ("too short", "has 1 frame at 8 fps"),
}
GOOD = ("good", "vfr", "turned", "odd", "tiny")


class Deadly(PyavReader):
    """Reads with PyAV, but one file ends the process that decodes it."""

    def open(self, path: Path) -> PyavClip:
        clip = super().open(path)
        if path.name == "deadly.mp4":
            os.kill(os.getpid(), signal.SIGKILL)
        return clip


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Clips of every kind, good and bad."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "good.mp4")
    write_clip(folder / "vfr.mp4", times=[0, 1, 2, 3, 8, 9, 10, 15, 16, 17, 18, 30])
    write_clip(folder / "turned.mp4", rotation=90)
    write_clip(folder / "odd.mp4", size=(49, 65))
    write_clip(folder / "tiny.mp4", size=(16, 16))
    write_clip(folder / "short.mp4", 2)
    write_clip(folder / "one.mp4", 1)
    write_clip(folder / "deadly.mp4")
    write_sound(folder / "sound.mp4")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video\n" * 99)
    (folder / "cut.mp4").write_bytes((folder / "good.mp4").read_bytes()[:900])
    damage(write_clip(folder / "damaged.mp4"))
    return folder


@pytest.fixture
def recipe(tiny, tmp_path, material, monkeypatch):
    """The tiny recipe on all of them, to be skipped."""
    monkeypatch.setattr("cvx_plugins.readers.auto_reader.build", lambda cfg, deps=None: Deadly())
    list_clips(tmp_path, [f"{name}.mp4" for name in (*BAD, *GOOD)], material)
    tiny["dataset"] = {"use": "jsonl", "path": "clips.jsonl"}
    tiny["video"] = VIDEO
    tiny["loader"] = {"batch": 2, "unreadable": "skip", "max_drop": 0.8}
    tiny["output"] = str(tmp_path / "out")
    return tiny


def account(folder: Path) -> dict:
    return json.loads((folder / "data.json").read_text())


def test_clips_of_every_bad_kind_are_left_out_counted_and_reported(recipe, launch, log_of, caplog, tmp_path):
    caplog.set_level("INFO", logger="cvx")
    folder = launch(recipe, **{"task.steps": 6})
    found = account(folder)
    fates = {clip["row"]: clip for clip in found["clips"]}
    for name, (reason, detail) in BAD.items():
        assert fates[name]["bucket"] is None
        assert fates[name]["reason"] == reason, fates[name]
        assert detail in fates[name]["detail"]
        assert f"row {name!r}: " in fates[name]["detail"] or reason == "too short"
    left_over = found["reasons"].pop("left over")  # five rows are two batches of two
    assert found["reasons"] == {"unreadable": 6, "too short": 2}
    assert found["dropped"] == len(BAD) + left_over
    assert found["kept"] + found["dropped"] == found["rows"] == len(BAD) + len(GOOD)
    assert "6 unreadable: first 'damaged', row 'damaged': " in caplog.text
    trained = {row for line in log_of(folder) for row in line["rows"]}
    assert trained == set(GOOD)
    page = (folder / "report.html").read_text()
    assert "unreadable" in page
    assert "crashes the decoder" in page


def test_what_was_decoded_once_is_known_to_a_resumed_run_until_a_file_changes(
    recipe, launch, log_of, material, tmp_path, monkeypatch
):
    names = ["good", "damaged", "odd", "vfr"]
    list_clips(tmp_path, [f"{name}.mp4" for name in names], material)
    recipe["loader"]["batch"] = 1
    whole = launch(recipe, output=str(tmp_path / "whole"))
    out = launch(recipe, **{"task.stop_at": 2})
    decoded, real = [], readable.decode_all

    def decode_all(rows, *rest):
        decoded.extend(row.id for row in rows)
        return real(rows, *rest)

    monkeypatch.setattr(readable, "decode_all", decode_all)
    launch(recipe, **{"task.resume": "auto"})
    assert decoded == []
    assert log_of(out) == log_of(whole)
    mine = tmp_path / "mine.mp4"
    mine.write_bytes((material / "good.mp4").read_bytes())
    list_clips(tmp_path, [str(mine), *(f"{name}.mp4" for name in names)], material)
    for steps, broken in ((5, False), (6, True)):
        if broken:
            damage(mine)
        launch(recipe, **{"task.resume": "auto", "task.steps": steps})
        assert {c["row"] for c in account(out)["clips"] if c["reason"] == "unreadable"} == (
            {"damaged", "mine"} if broken else {"damaged"}
        )
    assert decoded == ["mine", "mine"]


def test_more_than_the_limit_is_an_error_before_the_first_step(recipe, launch, tmp_path):
    with pytest.raises(CvxError, match=r"8 of 13 rows \(62%\) are dropped, .*max_drop allows 60%"):
        launch(recipe, **{"loader.max_drop": 0.6, "loader.batch": 1})
    assert not (tmp_path / "out/checkpoints").exists()
    assert not (tmp_path / "out/log.jsonl").exists()
    del recipe["loader"]["max_drop"]
    with pytest.raises(CvxError, match=r"max_drop allows 10%"):
        launch(recipe)


def test_an_image_that_cannot_be_read_costs_its_row(recipe, launch, material, tmp_path):
    Image.new("RGB", (48, 32)).save(tmp_path / "i.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "i.png").read_bytes()[:40])
    lines = [
        {"file": str(material / "good.mp4"), "captions": "x", "id": name, "image": f"{name}.png"}
        for name in ("i", "bad")
    ]
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe["loader"]["batch"] = 1
    folder = launch(recipe, **{"task.steps": 2})
    assert account(folder)["reasons"] == {"unreadable": 1}
    assert "row 'bad': " in account(folder)["clips"][1]["detail"]


def test_without_the_policy_a_clip_that_fails_later_is_an_error_that_keeps_what_was_saved(
    recipe, launch, material, tmp_path
):
    list_clips(tmp_path, ["good.mp4", "damaged.mp4"], material)
    recipe["loader"] = {"batch": 1, "shuffle": False}
    with closing(PyavReader().open(material / "damaged.mp4")) as clip:
        assert clip.num_frames == 12, "looking at the file shows no fault"
    with pytest.raises(CvxError, match=r"row 'damaged': .*damaged.mp4: .*(fetch it again or drop its row)"):
        launch(recipe, **{"task.save_every": 1, "video.frames": 9})
    assert (tmp_path / "out/checkpoints/step-00000001/manifest.json").exists()
    [start] = json.loads((tmp_path / "out/environment.json").read_text())["starts"]
    assert "row 'damaged'" in start["ended"]["how"]


def test_a_worker_that_dies_names_the_remedy(recipe, launch, material, tmp_path):
    list_clips(tmp_path, ["good.mp4", "deadly.mp4"], material)
    recipe["loader"] = {"batch": 1, "shuffle": False}
    launch(recipe, **{"task.stop_at": 1})
    with pytest.raises(CvxError, match=r"a loader worker died: .* loader.unreadable: skip leaves"):
        launch(recipe, **{"task.resume": "auto", "loader.workers": 1})
    assert (tmp_path / "out/checkpoints/step-00000001/manifest.json").exists()


def test_it_has_no_meaning_for_what_is_encoded(recipe, launch, tmp_path):
    (tmp_path / "cache").mkdir()
    recipe["dataset"] = {"use": "feature-cache", "path": "cache"}
    del recipe["loader"]["max_drop"]
    with pytest.raises(RecipeError, match=r"loader.unreadable: is about clips, and dataset 'feature-cache'"):
        launch(recipe)
