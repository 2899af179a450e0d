"""What `cvx data inspect` finds: every file decoded, every row kept or dropped with its reason."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from cvx_core import cli, run
from cvx_core.errors import CvxError, FormatError
from cvx_core.interfaces import Row
from cvx_io.decoding import Decoded, decode_all

RECIPE = """
video: {fps: 8}
text_encoder: {use: t5, tokenizer: bytes, max_length: 16}
dataset: {use: jsonl, path: clips.jsonl}
reader: {use: pyav, threads: 1}
loader: {buckets: {48x64: {9: [0.5, 1]}, 32x48: {5: [1.0, 1], 1: [1.0, 1]}}, max_drop: 0.9}
task: {use: inspect, jobs: 1}
"""


def write_clip(
    path: Path, count: int = 12, size: tuple[int, int] = (48, 64), fps: int = 8, **how: Any
) -> Path:
    """Write a clip of noise. times: pts of the frames; rotation: degrees."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p" if size[1] % 2 == 0 else "yuv444p"
        stream.codec_context.time_base = Fraction(1, fps)
        if how.get("rotation"):
            stream.set_display_rotation(how["rotation"])
        for k in range(count):
            pixels = np.random.default_rng(k).integers(0, 255, (*size, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = how["times"][k] if "times" in how else k
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of clip that goes wrong, among some that do not; inspected once, through the task."""
    folder = tmp_path_factory.mktemp("inspect")
    write_clip(folder / "good.mp4")
    (folder / "copy.mp4").write_bytes((folder / "good.mp4").read_bytes())
    write_clip(folder / "one.mp4", 1)
    write_clip(folder / "vfr.mp4", times=[0, 1, 2, 3, 8, 9, 10, 15, 16, 17, 18, 30])
    write_clip(folder / "rotated.mp4", rotation=90)
    write_clip(folder / "odd.mp4", size=(49, 65))
    write_clip(folder / "short.mp4", 2)
    write_clip(folder / "small.mp4", size=(16, 16))
    write_sound(folder / "sound.mp4")
    (folder / "empty.mp4").touch()
    damaged = bytearray((folder / "good.mp4").read_bytes())
    damaged[len(damaged) // 3 : len(damaged) // 2] = bytes(len(damaged) // 2 - len(damaged) // 3)
    (folder / "damaged.mp4").write_bytes(damaged)
    (folder / "cut.mp4").write_bytes((folder / "good.mp4").read_bytes()[:900])
    Image.new("RGB", (60, 40), "red").save(folder / "still.png")
    names = [p.name for p in sorted(folder.iterdir())]
    lines = [json.dumps({"file": name, "captions": "x", "id": name}) for name in names]
    lines.append(json.dumps({"file": "good.mp4", "captions": "a caption of many tokens", "id": "long"}))
    lines.append(json.dumps({"file": "good.mp4", "captions": " ", "id": "blank"}))
    lines.append(json.dumps({"file": "absent.mp4", "captions": "x", "id": "absent"}))
    (folder / "clips.jsonl").write_text("\n".join(lines))
    (folder / "r.yaml").write_text(RECIPE)
    assert run.main([str(folder / "r.yaml"), f"--set=output={folder / 'out'}"]) == 0
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "out/inspection.csv").open(newline="") as file:
        return {line["row"]: line for line in csv.DictReader(file)}


@pytest.mark.parametrize(
    ("name", "field", "text"),
    [
        ("good.mp4", "bucket", "48x64/9x48x64"),
        ("good.mp4", "frames", "12"),
        ("good.mp4", "notes", "keep_prob: stays with probability 0.5, else goes on to: 32x48/5x32x48"),
        ("copy.mp4", "kept", "yes"),
        ("good.mp4", "duplicate", "copy.mp4"),
        ("one.mp4", "bucket", "32x48/1x32x48"),
        ("still.png", "bucket", "32x48/1x32x48"),
        ("vfr.mp4", "notes", "frames are picked by their times"),
        ("rotated.mp4", "height", "64"),
        ("rotated.mp4", "bucket", "32x48/5x32x48"),
        ("odd.mp4", "width", "65"),
        ("odd.mp4", "bucket", "48x64/9x48x64"),
        ("short.mp4", "reason", "too short: has 2 frames at 8 fps; 5 frames at 8 fps need 5"),
        ("small.mp4", "reason", "too small: 16x16 would be enlarged 3.00 times for 32x48"),
        ("sound.mp4", "reason", "has no video stream, only audio"),
        ("empty.mp4", "reason", "the file is empty"),
        ("damaged.mp4", "reason", "unreadable: "),
        ("cut.mp4", "reason", "unreadable: "),
        ("long", "notes", "long caption: 25 tokens are cut to 16"),
        ("long", "tokens", "25"),
    ],
)
def test_each_clip_is_found_out(found: dict, name: str, field: str, text: str) -> None:
    assert text in found[name][field], found[name]


def test_rows_that_cannot_be_listed_are_dropped_with_their_place(found: dict, folder: Path) -> None:
    reasons = {row: line["reason"] for row, line in found.items() if line["reason"].startswith("not listed")}
    assert len(reasons) == 2
    assert f"{folder}/clips.jsonl:15" in reasons
    assert "caption is blank" in reasons[f"{folder}/clips.jsonl:15"]
    assert "absent.mp4' does not exist" in reasons[f"{folder}/clips.jsonl:16"]


def test_the_page_needs_nothing_but_itself_and_shows_every_clip(found: dict, folder: Path) -> None:
    page = (folder / "out/inspection.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "<script" not in page
    readable = [line for line in found.values() if line["frames"]]
    assert page.count("data:image/jpeg;base64,") == len(readable) > 8
    assert page.count("<tr class=") == len(found)


def test_the_command_says_the_same_and_fails_over_the_limit(folder: Path, capsys, tmp_path: Path) -> None:
    keep = json.dumps({"file": str(folder / "good.mp4"), "captions": "x", "id": "good"})
    lost = json.dumps({"file": str(folder / "empty.mp4"), "captions": "x", "id": "lost"})
    (tmp_path / "clips.jsonl").write_text(f"{keep}\n{lost}\n")
    (tmp_path / "r.yaml").write_text(RECIPE)
    argv = ["data", "inspect", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "report"), "--jobs", "1"]
    assert cli.main([*argv, "--set", "loader.max_drop=0.5"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"good +12 +8 -> 8 +48x64 +48x64/9x48x64 +2/16 +keep_prob", said), said
    assert "2 rows: 1 kept, 1 dropped" in said
    assert cli.main([*argv, "--set", "loader.max_drop=0.4"]) == 1
    assert (tmp_path / "report/inspection.html").exists()
    assert cli.main([*argv, "--set", "reader.use=none"]) == 2


class Deadly:
    """A reader that does not survive some files."""

    def open(self, path: Path) -> Any:
        if path.name == "crash.mp4":
            os.kill(os.getpid(), signal.SIGSEGV)
        if path.name == "hang.mp4":
            signal.pause()
        if path.name == "odd.mp4":
            raise ZeroDivisionError("of the library")
        return Ten()


class Ten:
    num_frames, fps, height, width = 10, 8, 16, 16

    def frames(self, indices: Any) -> np.ndarray:
        return np.zeros((len(indices), 16, 16, 3), np.uint8)

    def close(self) -> None:
        pass


def test_a_crash_and_a_hang_cost_one_file_each(tmp_path: Path) -> None:
    names = ["a.mp4", "crash.mp4", "b.mp4", "hang.mp4", "odd.mp4", "c.mp4"]
    for name in names:
        (tmp_path / name).touch()
    rows = [Row(name, ("x",), tmp_path / name) for name in names]
    results = dict(zip(names, decode_all(rows, Deadly(), jobs=1, timeout_s=2), strict=True))
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        assert isinstance(results[name], Decoded)
        assert results[name].facts.num_frames == 10
    for name, text in (("crash", "exit code -11"), ("hang", "after 2 s"), ("odd", "ZeroDivisionError")):
        error = results[f"{name}.mp4"]
        assert isinstance(error, FormatError)
        assert text in str(error)
        assert f"{name}.mp4" in str(error)


class Unready:
    """A reader that cannot reach another process."""

    def __reduce__(self) -> Any:
        return (sys.exit, (3,))


def test_a_reader_that_does_not_start_is_no_files_fault(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    rows = [Row("a", ("x",), tmp_path / "a.mp4")]
    with pytest.raises(CvxError, match=r"does not start \(exit code \d+\).*Is the reader's"):
        list(decode_all(rows, Unready()))
