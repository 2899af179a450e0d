"""The readers agree bit for bit, count exactly, seek exactly, and say what is wrong with a file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from cvx_core.errors import FormatError

Make = Callable[..., Any]
SHORT_CLIPS = ("hiker.mp4", "horse.mp4", "train_running.mp4", "hiker_tiny.mp4")
OPEN_GOP = {"x264_params": "open-gop=1:keyint=6:min-keyint=2:bframes=3:b-adapt=0:scenecut=0"}


def sequential(path: Path, rotation: int = 0) -> np.ndarray:
    """Every frame as FFmpeg shows them when nobody seeks."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.rot90(np.stack(frames), rotation // 90, axes=(1, 2))


@pytest.mark.parametrize("file", SHORT_CLIPS)
def test_decord_and_pyav_give_the_same_frames(reader: Make, shared: Path, file: str) -> None:
    pytest.importorskip("decord")
    clips = [reader(name).open(shared / "data/clips" / file) for name in ("decord", "pyav")]
    assert [(clip.num_frames, clip.fps) for clip in clips] == [(49, 8.0)] * 2
    np.testing.assert_array_equal(*(clip.frames(range(49)) for clip in clips))


def test_frames_are_the_same_where_the_container_states_no_count(reader: Make, shared: Path) -> None:
    pytest.importorskip("decord")
    clips = [reader(name).open(shared / "data/clips/gallery.webm") for name in ("decord", "pyav")]
    for clip in clips:
        assert (clip.num_frames, clip.fps, clip.height, clip.width) == (453, 30.0, 720, 1280)
    np.testing.assert_array_equal(*(clip.frames([0, 1, 7, 130, 385, 452]) for clip in clips))


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("plain.mp4", {}),
        ("short.mp4", {"g": "5", "bf": "3"}),
        ("full444.mp4", {"pix_fmt": "yuv444p", "size": (51, 53)}),
        ("narrow.mp4", {"size": (34, 46), "fps": Fraction(30000, 1001)}),
        ("vp9.webm", {"codec": "libvpx-vp9", "auto_alt_ref": "1", "lag_in_frames": "16"}),
        ("vp8.webm", {"codec": "libvpx", "auto_alt_ref": "1", "lag_in_frames": "16"}),
        ("right.mp4", {"rotation": 90, "size": (64, 96)}),
        ("left.mp4", {"rotation": -90, "size": (64, 96)}),
        ("upside-down.mp4", {"rotation": 180}),
    ],
)
def test_libraries_agree_on_other_codecs_colours_and_rotations(
    reader: Make, encode: Make, file: str, options: dict[str, Any]
) -> None:
    pytest.importorskip("decord")
    path = encode(file, **options)
    expected = sequential(path, options.get("rotation", 0) % 360)
    for name in ("pyav", "decord"):
        clip = reader(name).open(path)
        assert (clip.num_frames, clip.height, clip.width) == expected.shape[:3]
        assert clip.fps == pytest.approx(float(options.get("fps", 8)), abs=1e-9)
        np.testing.assert_array_equal(clip.frames(range(len(expected))), expected, err_msg=name)


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("open.mp4", OPEN_GOP),
        ("hevc.mp4", {"codec": "libx265", "x265_params": "log-level=none:keyint=8"}),
        ("stream.ts", {"g": "7"}),
        ("old.avi", {"codec": "mpeg4"}),
        ("reordered.avi", {}),
        ("deep.mp4", {"pix_fmt": "yuv420p10le"}),
        ("narrow.mp4", {"size": (64, 48)}),
    ],
)
def test_only_pyav_reads_what_decord_would_get_wrong(
    reader: Make, encode: Make, file: str, options: dict[str, Any]
) -> None:
    pytest.importorskip("decord")
    path = encode(file, **options)
    expected = sequential(path)
    clip = reader("pyav").open(path)
    for k in (25, 13, 3, 21, 12, 0, 24):
        np.testing.assert_array_equal(clip.frames([k])[0], expected[k], err_msg=f"frame {k}")
    with pytest.raises(FormatError, match=r"decord does not deliver exact frames.*use: auto"):
        reader("decord").open(path)
    assert reader("auto").choice(path) == "pyav"
    np.testing.assert_array_equal(reader("auto").open(path).frames(range(26)), expected)


def test_auto_says_which_library_it_takes(
    reader: Make, encode: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("decord")
    path = encode("plain.mp4")
    with caplog.at_level(logging.INFO, "cvx"):
        assert reader("auto", prefer="decord").choice(path) == "decord"
        assert reader("auto").choice(path) == "pyav"
        monkeypatch.setitem(sys.modules, "decord", None)
        assert reader("auto", prefer="decord").choice(path) == "pyav"
    assert "reader auto: decord" in caplog.messages[0]
    assert "decord is not installed" in caplog.messages[-1]


def test_rotation_by_other_than_quarter_turns_is_an_error(reader: Make, encode: Make) -> None:
    with pytest.raises(FormatError, match="only quarter turns"):
        reader("auto").open(encode("tilted.mp4", rotation=30))


@pytest.mark.parametrize("name", ["pyav", "decord", "auto"])
def test_a_cut_or_damaged_file_is_never_shorter_than_it_says(
    reader: Make, encode: Make, shared: Path, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("decord")
    whole = (shared / "data/clips/hiker_tiny.mp4").read_bytes()
    middle = len(whole) // 2
    webm = (shared / "data/clips/gallery.webm").read_bytes()
    cut = tmp_path / "cut.mp4"
    for data in (whole[:middle], webm[: len(webm) // 50]):
        cut.write_bytes(data)
        with pytest.raises(FormatError, match=r"cut.mp4: .*(truncated|damaged)"):
            reader(name).open(cut)
    cut.write_bytes(whole[:middle] + bytes(3000) + whole[middle + 3000 :])
    clip = reader(name).open(cut)
    with pytest.raises(FormatError, match=r"cut.mp4: .*(damaged).*(drop|fetch)"):
        clip.frames(range(clip.num_frames))


@pytest.mark.parametrize("name", ["pyav", "decord", "auto"])
def test_a_file_without_video_is_an_error(reader: Make, tmp_path: Path, name: str) -> None:
    pytest.importorskip("decord")
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(FormatError, match=r"sound.mp4: has no video stream, only audio"):
        reader(name).open(path)


def test_reading_on_decodes_each_frame_once(
    reader: Make, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = reader("pyav").open(shared / "data/clips/hiker_tiny.mp4")
    starts: list[int] = []
    packets_from = clip._packets_from
    monkeypatch.setattr(clip, "_packets_from", lambda key: starts.append(key) or packets_from(key))
    for k in range(0, 40, 4):
        clip.frames([k, k + 2])
    assert starts == [0]
