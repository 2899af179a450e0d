"""What every video reader must satisfy: exact counts, and the same frame whichever way it is reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvx_core.errors import FormatError
from cvx_core.registry import Registry
from cvx_core.testing import Suite

NUM_FRAMES, FPS, HEIGHT, WIDTH = 23, 12, 48, 64


def suite(name: str, **fields: Any) -> Suite:
    """Return the checks of reader `name`, made with `fields` on top of its preset.

    The clip they read has several key frames and frames that are stored in another order than they are shown.
    """

    def made() -> Any:
        component = Registry.discover().get("reader", name)
        assert component.config is not None
        return component.load()(component.config(**{**component.preset, **fields}), None)

    def clip_states_what_it_holds(tmp_path: Path) -> None:
        clip = made().open(write_clip(tmp_path / "clip.mp4"))
        assert (clip.num_frames, clip.fps, clip.height, clip.width) == (NUM_FRAMES, FPS, HEIGHT, WIDTH)
        clip.close()

    def frames_come_in_the_order_shown(tmp_path: Path) -> None:
        clip = made().open(write_clip(tmp_path / "clip.mp4"))
        frames = clip.frames(range(NUM_FRAMES))
        assert (frames.shape, frames.dtype) == ((NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8)
        for k, frame in enumerate(frames):
            assert abs(float(frame.mean()) - _grey(k)) < 4, f"frame {k}"
        clip.close()

    def random_access_equals_sequential(tmp_path: Path) -> None:
        path = write_clip(tmp_path / "clip.mp4")
        clip = made().open(path)
        whole = clip.frames(range(NUM_FRAMES))
        for k in np.random.default_rng(0).permutation(NUM_FRAMES).tolist():
            np.testing.assert_array_equal(clip.frames([k])[0], whole[k], err_msg=f"frame {k}")
        clip.close()
        fresh = made().open(path)
        np.testing.assert_array_equal(fresh.frames(range(9, NUM_FRAMES, 4)), whole[9::4])
        fresh.close()

    def indices_may_repeat(tmp_path: Path) -> None:
        clip = made().open(write_clip(tmp_path / "clip.mp4"))
        frames = clip.frames([0, 0, 5, 22, 22, 22])
        np.testing.assert_array_equal(frames, clip.frames([0, 5, 22])[[0, 0, 1, 2, 2, 2]])
        assert clip.frames([]).shape == (0, HEIGHT, WIDTH, 3)
        clip.close()

    def indices_outside_are_an_error(tmp_path: Path) -> None:
        clip = made().open(write_clip(tmp_path / "clip.mp4"))
        for indices in ([NUM_FRAMES], [-1], [5, 4]):
            with pytest.raises(IndexError):
                clip.frames(indices)
        clip.close()

    def closing_twice_is_harmless(tmp_path: Path) -> None:
        clip = made().open(write_clip(tmp_path / "clip.mp4"))
        clip.close()
        clip.close()
        with pytest.raises(FormatError, match="closed"):
            clip.frames([0])

    def unreadable_files_are_named(tmp_path: Path) -> None:
        (tmp_path / "empty.mp4").touch()
        (tmp_path / "text.mp4").write_text("no video\n" * 99)
        for file in ("empty.mp4", "text.mp4", "absent.mp4"):
            with pytest.raises(FormatError, match=file):
                made().open(tmp_path / file)

    return Suite.of(
        name,
        clip_states_what_it_holds,
        frames_come_in_the_order_shown,
        random_access_equals_sequential,
        indices_may_repeat,
        indices_outside_are_an_error,
        closing_twice_is_harmless,
        unreadable_files_are_named,
    )


def write_clip(path: Path) -> Path:
    """Write the clip of the checks: frame k has a grey level of its own, every sixth is a key frame."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.options = {"crf": "12", "g": "6", "bf": "2"}
        for k in range(NUM_FRAMES):
            pixels = np.full((HEIGHT, WIDTH, 3), _grey(k), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def _grey(k: int) -> int:
    return 20 + 9 * k
