"""Videos side by side: where they stand, what becomes of their sizes, and of one that is missing."""

import numpy as np
import pytest
from PIL import Image

from cvx_core import FormatError
from cvx_io.video_grid import GridRow, read_mp4, smaller, write_grid
from cvx_io.video_write import read_metadata, write_mp4


def video(level, frames=3, height=160, width=200):
    return np.full((frames, height, width, 3), level, np.uint8)


def test_rows_and_columns_stand_where_they_belong(tmp_path):
    rows = [GridRow("first", [video(10), video(90)]), GridRow("second", [None, video(200)])]
    write_grid(tmp_path / "grid.mp4", ["base", "trained"], rows, 8, {"prompt": "a"})
    grid, fps = read_mp4(tmp_path / "grid.mp4")
    assert (grid.shape, fps) == ((3, 22 + 2 * 182, 6 + 2 * 206, 3), 8)
    at = [[int(grid[0, top + 80, left + 100].mean()) for left in (6, 212)] for top in (22, 204)]
    assert np.abs(np.array(at) - [[10, 90], [120, 200]]).max() <= 4
    assert read_metadata(tmp_path / "grid.mp4") == {"prompt": "a"}


def test_the_words_are_drawn(tmp_path):
    for name in ("a", "b"):
        write_grid(tmp_path / f"{name}.mp4", [f"{name} " * 9], [GridRow(f"{name} " * 9, [video(50)])], 8)
    one, other = (read_mp4(tmp_path / f"{name}.mp4")[0][0].astype(int) for name in ("a", "b"))
    above, below = np.abs(one - other)[:18].max(), np.abs(one - other)[22 + 160 :].max()
    assert above > 100
    assert below > 100


def test_a_shorter_video_stays_on_its_last_frame(tmp_path):
    short = np.concatenate([video(10, 1), video(200, 1)])
    write_grid(tmp_path / "grid.mp4", ["a", "b"], [GridRow("", [short, video(90, 5)])], 8)
    grid, _ = read_mp4(tmp_path / "grid.mp4")
    assert [round(float(frame[100, 100].mean()), -1) for frame in grid] == [10, 200, 200, 200, 200]


def test_large_videos_are_made_smaller_and_tiny_ones_larger(tmp_path):
    assert smaller(video(1, height=481, width=722)).shape[1:3] == (318, 480)
    write_grid(tmp_path / "large.mp4", ["a"], [GridRow("", [video(9, 1, 480, 960)])], 8)
    assert read_mp4(tmp_path / "large.mp4")[0].shape[2] == 480 + 12
    write_grid(tmp_path / "tiny.mp4", ["a"], [GridRow("", [video(9, 1, 32, 48)])], 8)
    assert read_mp4(tmp_path / "tiny.mp4")[0].shape[2] == 3 * 48 + 12


def test_no_video_makes_no_grid(tmp_path):
    with pytest.raises(ValueError, match="at least one video"):
        write_grid(tmp_path / "grid.mp4", ["a"], [GridRow("", [None])], 8)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_video_is_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    with pytest.raises(FormatError, match=r"a\.mp4: cannot be read as a video.*sample it anew"):
        read_mp4(tmp_path / "a.mp4")
    with pytest.raises(FormatError, match="cannot be read as a video"):
        read_mp4(tmp_path / "absent.mp4")


def test_frames_come_back_as_they_were_written_but_for_the_encoder(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 255, 64)[None, None, :, None], (2, 48, 64, 3)).astype(np.uint8)
    write_mp4(tmp_path / "a.mp4", ramp, 12.5)
    frames, fps = read_mp4(tmp_path / "a.mp4")
    assert np.abs(frames.astype(int) - ramp).mean() < 3
    assert fps == 12.5
    assert Image.fromarray(frames[0]).size == (64, 48)
