"""The readers agree bit for bit, count exactly, seek exactly, and say what is wrong with a file."""

from __future__ import annotations

import logging
import struct
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from cvx_core.errors import FormatError
from cvx_core.interfaces import Row
from cvx_io.decoding import decode
from cvx_io.video import Pick, read_row

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


@pytest.fixture
def scratched(shared: Path, tmp_path: Path) -> Callable[[float, int, int], Path]:
    """Return a function that writes a clip of which some bytes of the frames are others."""

    def written(share: float, count: int, value: int) -> Path:
        content = bytearray((shared / "data/clips/horse.mp4").read_bytes())
        first = content.find(b"mdat")
        first += int((len(content) - first) * share)
        content[first : first + count] = bytes([value]) * count
        path = tmp_path / f"{count}.mp4"
        path.write_bytes(content)
        return path

    return written


SCRATCHES = [(0.3, 40, 0x00), (0.5, 400, 0xFF), (0.7, 2000, 0x55)]


@pytest.mark.parametrize("scratch", SCRATCHES)
def test_a_few_bad_bytes_are_found_every_time(reader: Make, scratched: Make, scratch: Any) -> None:
    path, opener = scratched(*scratch), reader("auto")
    for _ in range(8):
        clip = opener.open(path)
        # With more threads, some of these bytes are found in most of the times only.
        assert clip._container.streams.video[0].codec_context.thread_count == 1
        with pytest.raises(FormatError, match="cannot be decoded"):
            clip.frames(range(clip.num_frames))
        clip.close()


@pytest.mark.parametrize("fields", [{"name": "decord"}, {"name": "auto", "prefer": "decord"}])
def test_inspecting_finds_them_whatever_reads(reader: Make, scratched: Make, fields: Any) -> None:
    """decord shows what FFmpeg made up for them."""
    pytest.importorskip("decord")
    opener = reader(**fields)
    for scratch in SCRATCHES:
        row = Row("a", ("a",), video=scratched(*scratch))
        with pytest.raises(FormatError, match="cannot be decoded"):
            decode(row, opener)


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


TIMES = [0, 1, 2, 3, 8, 9, 10, 15, 16, 17, 18, 30]
"""When each frame of a clip is shown, in units of 1/8 s."""


@pytest.mark.parametrize("name", ["pyav", "decord", "auto"])
def test_frames_of_a_variable_rate_are_those_shown_at_each_instant(
    reader: Make, tmp_path: Path, name: str
) -> None:
    """Every frame has a grey level of its own, so that pixels tell which one was taken."""
    pytest.importorskip("decord")
    path = grey_clip(tmp_path / "vfr.mp4", TIMES)
    assert reader(name).open(path).times == pytest.approx([time / 8 for time in TIMES])
    assert reader(name).open(grey_clip(tmp_path / "steady.mp4", list(range(12)))).times is None
    for pick, shown in (
        (Pick(5, 2), [0, 3, 4, 6, 8]),  # at 0, 4, 8, 12, 16 eighths
        (Pick(9, 8), [0, 1, 2, 3, 3, 3, 3, 3, 4]),
        (Pick(4, 1, start="center"), [1, 5, 9, 10]),  # at 1, 9, 17, 25 eighths
    ):
        item = read_row(Row("vfr", ("x",), path), reader(name), pick, 48, 64)
        assert item.video is not None
        greys = (item.video.mean((0, 2, 3)) + 1) * 127.5
        assert [round((float(grey) - 20) / 15) for grey in greys] == shown


def grey_clip(path: Path, times: list[int]) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 8)
        stream.options = {"crf": "12"}
        for k, time in enumerate(times):
            pixels = np.full((48, 64, 3), 20 + 15 * k, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("degrees", "corner"), [(90, (1, 0)), (180, (1, 1)), (270, (0, 1))])
def test_rotated_clips_are_turned_as_players_show_them(
    reader: Make, tmp_path: Path, degrees: int, corner: tuple[int, int]
) -> None:
    """The white corner, top left as stored, lies where a turn counter-clockwise takes it."""
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv420p"
        stream.set_display_rotation(degrees)
        pixels = np.zeros((48, 80, 3), np.uint8)
        pixels[:16, :16] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    clip = reader("auto").open(path)
    frame = clip.frames([0])[0]
    assert frame.shape == ((80, 48, 3) if degrees % 180 else (48, 80, 3))
    rows, columns = np.nonzero(frame.mean(-1) > 200)
    height, width = frame.shape[:2]
    assert (rows.mean() > height / 2, columns.mean() > width / 2) == corner


@pytest.mark.parametrize("mirror", [(-1, 1), (1, -1)])
def test_a_mirrored_clip_is_an_error(reader: Make, tmp_path: Path, mirror: tuple[int, int]) -> None:
    """FFmpeg calls the first of them turned by half, so that it would be read upside down."""
    data = bytearray(grey_clip(tmp_path / "mirrored.mp4", list(range(5))).read_bytes())
    straight = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    x, y = mirror
    shift = (0 if x > 0 else 64 << 16, 0 if y > 0 else 48 << 16)
    turned = struct.pack(">9i", x << 16, 0, 0, 0, y << 16, 0, *shift, 1 << 30)
    start = data.index(straight, data.index(b"tkhd"))
    data[start : start + len(turned)] = turned
    (tmp_path / "mirrored.mp4").write_bytes(data)
    with pytest.raises(FormatError, match=r"mirrored.mp4: is mirrored by its display matrix.*Write it anew"):
        reader("auto").open(tmp_path / "mirrored.mp4")
