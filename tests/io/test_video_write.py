"""Videos, gifs and contact sheets are written whole, with metadata, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from cvx_core import Registry
from cvx_core.errors import FormatError
from cvx_io.video_write import read_metadata, to_uint8, write_gif, write_mp4, write_sheet


@pytest.fixture
def frames() -> np.ndarray:
    """Smooth frames (9,48,64,3), which survive compression."""
    y, x = np.mgrid[:48, :64]
    return np.stack([np.stack([x * 3, y * 4, x + y + 8 * k], axis=-1) for k in range(9)]).astype(np.uint8)


def test_mp4_keeps_frames_rate_and_metadata(tmp_path: Path, frames: np.ndarray) -> None:
    metadata = {"prompt": 'a "cat" \u7c73', "seed": 7, "steps": [1, 2]}
    path = tmp_path / "new" / "clip.mp4"
    write_mp4(path, frames, 30000 / 1001, metadata)
    assert read_metadata(path) == metadata
    component = Registry.discover().get("reader", "auto")
    assert component.config is not None
    clip = component.load()(component.config(), None).open(path)
    assert (clip.num_frames, clip.height, clip.width) == (9, 48, 64)
    assert clip.fps == pytest.approx(30000 / 1001)
    assert np.abs(clip.frames(range(9)).astype(int) - frames).mean() < 2
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
    assert list(path.parent.iterdir()) == [path], "no temporary file is left"


def test_mp4_without_metadata_reads_back_empty(tmp_path: Path, frames: np.ndarray) -> None:
    write_mp4(tmp_path / "a.mp4", frames, 8)
    assert read_metadata(tmp_path / "a.mp4") == {}
    (tmp_path / "b.mp4").write_text("no video")
    with pytest.raises(FormatError, match=r"b.mp4"):
        read_metadata(tmp_path / "b.mp4")


def test_odd_sizes_are_refused(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="even size, got 47x64"):
        write_mp4(tmp_path / "a.mp4", frames[:, :47], 8)


@pytest.mark.parametrize("bad", [np.zeros((0, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.float32)])
def test_other_arrays_are_refused(tmp_path: Path, bad: Any) -> None:
    for write in (write_mp4, write_gif):
        with pytest.raises(ValueError, match="uint8"):
            write(tmp_path / "a", bad, 8)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, frames: np.ndarray) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(path, frames, 8)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_mp4(path, frames, 8, {"no json": object()})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_gif_keeps_count_and_total_time(tmp_path: Path, frames: np.ndarray) -> None:
    write_gif(tmp_path / "a.gif", frames, 16)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.size) == (9, (64, 48))
        durations = []
        for k in range(9):
            image.seek(k)
            durations.append(image.info["duration"])
    assert abs(sum(durations) - 9 / 16 * 1000) <= 5


def test_sheet_shows_every_clip_with_its_label(tmp_path: Path, frames: np.ndarray) -> None:
    clips = [("a cat", frames), ("a long label " * 30, frames[:1]), ("wide", frames[:, :24])]
    write_sheet(tmp_path / "sheet.png", clips, columns=3, frame_width=64)
    with Image.open(tmp_path / "sheet.png") as image:
        sheet = np.asarray(image).astype(int)
    assert sheet.shape == (6 + 3 * (48 + 22), 12 + 3 * 64 + 2 * 6, 3)
    for column, k in enumerate((0, 4, 8)):
        left = 6 + column * 70
        assert np.array_equal(sheet[6:54, left : left + 64], frames[k])
    for top in (54, 124, 170):  # the wide clip is less high
        assert (sheet[top : top + 16] < 100).any(), "a label in ink"
    assert (sheet[:, -6:] == 255).all(), "labels stay within the sheet"


def test_many_clips_stand_side_by_side(tmp_path: Path, frames: np.ndarray) -> None:
    write_sheet(tmp_path / "sheet.png", [("a", frames)] * 32, columns=4, frame_width=64)
    with Image.open(tmp_path / "sheet.png") as image:
        assert 0.5 < image.width / image.height < 2


def test_values_become_bytes_by_rounding_and_clamping() -> None:
    video = torch.tensor([-2.0, -1, 0, 1, 1.5, 0.00393]).view(1, 1, 1, 6).expand(3, 1, 1, 6)
    assert to_uint8(video)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 128]
    every = torch.arange(256).view(1, 1, 16, 16).expand(3, 1, 16, 16)
    assert np.array_equal(to_uint8(every / 127.5 - 1), every.permute(1, 2, 3, 0).numpy())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_video_with_bad_values_is_never_written(value: float) -> None:
    video = torch.zeros(3, 2, 4, 4)
    video[0, 1, 2, 2:] = value
    with pytest.raises(FormatError, match="2 of 96 values are not finite"):
        to_uint8(video)


def test_the_same_frames_make_the_same_file_whatever_was_decoded_before(tmp_path):
    video = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
    files = set()
    for _ in range(60):
        write_mp4(tmp_path / "a.mp4", video, 8)
        files.add((tmp_path / "a.mp4").read_bytes())
        with av.open(str(tmp_path / "a.mp4")) as container:
            assert len([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]) == 9
    assert len(files) == 1
