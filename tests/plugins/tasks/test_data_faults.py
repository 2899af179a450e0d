"""Bad clips and captions in training: a clear error, or a counted, reported skip; earlier work is kept."""

import json
import shutil

import pytest

from cvx_core import CvxError, FormatError
from tests.io.test_inspection import write_clip, write_sound

FAULTS = {
    "empty": ("unreadable", "the file is empty"),
    "cut": ("unreadable", "cut.mp4"),
    "sound": ("unreadable", "has no video stream, only audio"),
    "text": ("unreadable", "text.mp4"),
    "short": ("too short", "has 2 frames at 8 fps; 5 frames at 8 fps need 5"),
    "one": ("still image", "no bucket has 1 frame"),
    "small": ("too small", "16x16 would be enlarged"),
}
KEPT = {"good": "48x64/5x48x64", "vfr": "48x64/5x48x64", "turned": "64x48/5x64x48", "odd": "48x64/5x48x64"}


@pytest.fixture
def clips(tiny, tmp_path):
    """The tiny recipe on clips of every kind; the fields of a recipe with two buckets."""
    write_clip(tmp_path / "good.mp4")
    write_clip(tmp_path / "vfr.mp4", times=[0, 1, 2, 3, 8, 9, 10, 15, 16, 17, 18, 30])
    write_clip(tmp_path / "turned.mp4", rotation=90)
    write_clip(tmp_path / "odd.mp4", size=(49, 65))
    write_clip(tmp_path / "short.mp4", 2)
    write_clip(tmp_path / "one.mp4", 1)
    write_clip(tmp_path / "small.mp4", size=(16, 16))
    write_sound(tmp_path / "sound.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video\n" * 99)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:900])
    list_clips(tmp_path, [*FAULTS, *KEPT])
    tiny["dataset"] = {"use": "jsonl", "path": "clips.jsonl"}
    tiny["video"] = {"fps": 8}
    tiny["loader"] = {"buckets": {"48x64": {5: [1.0, 1]}, "64x48": {5: [1.0, 1]}}, "max_drop": 0.7}
    return tiny


def list_clips(folder, names):
    lines = [json.dumps({"file": f"{name}.mp4", "captions": name, "id": name}) for name in names]
    (folder / "clips.jsonl").write_text("\n".join(lines))


def test_with_buckets_bad_clips_are_skipped_counted_and_reported(clips, launch, log_of, caplog):
    caplog.set_level("INFO", logger="cvx")
    folder = launch(clips)
    account = json.loads((folder / "data.json").read_text())
    fates = {clip["row"]: clip for clip in account["clips"]}
    for name, (reason, detail) in FAULTS.items():
        assert fates[name]["reason"] == reason, fates[name]
        assert detail in fates[name]["detail"]
        assert f"{reason}: first" in caplog.text
    assert {name: fates[name]["bucket"] for name in KEPT} == KEPT
    assert account["dropped"] == len(FAULTS)
    assert account["reasons"]["unreadable"] == 4
    assert {row for line in log_of(folder) for row in line["rows"]} == set(KEPT)


@pytest.mark.parametrize("name", ["empty", "cut", "sound", "text", "short"])
def test_without_buckets_a_bad_clip_is_an_error_that_names_row_file_and_cause(name, clips, launch, tmp_path):
    list_clips(tmp_path, [name])
    clips["loader"], clips["video"] = {"batch": 1}, {"frames": 5, "height": 32, "width": 48, "fps": 8}
    with pytest.raises(FormatError) as error:
        launch(clips)
    assert f"row {name!r}" in str(error.value)
    assert f"{name}.mp4" in str(error.value)
    assert FAULTS[name][1] in str(error.value)


def test_a_clip_that_breaks_later_costs_no_saved_step(clips, launch, log_of, tmp_path):
    """The file is damaged between two runs; what was saved goes on once it is whole again."""
    list_clips(tmp_path, ["good", "odd"])
    clips["loader"], clips["video"] = {"batch": 1}, {"frames": 5, "height": 32, "width": 48, "fps": 8}
    whole = launch(clips, output=str(tmp_path / "whole"))
    out = launch(clips, output=str(tmp_path / "out"), **{"task.stop_at": 2})
    shutil.copy(tmp_path / "odd.mp4", tmp_path / "spare")
    (tmp_path / "odd.mp4").write_bytes((tmp_path / "odd.mp4").read_bytes()[:900])
    with pytest.raises(CvxError, match=r"row 'odd'"):
        launch(clips, output=str(tmp_path / "out"), **{"task.resume": "auto"})
    assert (out / "checkpoints/step-00000002").is_dir()
    shutil.copy(tmp_path / "spare", tmp_path / "odd.mp4")
    launch(clips, output=str(tmp_path / "out"), **{"task.resume": "auto"})
    assert log_of(out) == log_of(whole)


def test_captions_too_long_are_cut_with_a_warning_that_shows_them(clips, launch, tmp_path, caplog):
    line = {"file": "good.mp4", "captions": "word " * 60, "id": "long"}
    (tmp_path / "clips.jsonl").write_text(json.dumps(line))
    clips["predictor"]["text_length"] = clips["text_encoder"]["max_length"] = 16
    clips["loader"]["buckets"] = {"48x64": {5: [1.0, 1]}}
    launch(clips, **{"task.steps": 1})
    assert "word word" in caplog.text
    assert "16" in caplog.text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"file": "good.mp4", "captions": ""}', "clips.jsonl:1: captions: a caption is blank"),
        (b'{"file": "good.mp4", "captions": "caf\xe9"}', "clips.jsonl:1: byte 0xe9 is not UTF-8"),
        (b'{"file": "absent.mp4", "captions": "x"}', "absent.mp4' does not exist"),
    ],
)
def test_bad_lines_stop_the_run_before_anything_is_trained(line, said, clips, launch, tmp_path):
    (tmp_path / "clips.jsonl").write_bytes(line)
    with pytest.raises(FormatError) as error:
        launch(clips, output=str(tmp_path / "out"))
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()
