"""The torchcodec reader: the kit where the library is installed; its own part with a stand-in for it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cvx_core.errors import CvxError, FormatError
from cvx_core.testing import reader as kit

try:
    importlib.import_module("torchcodec.decoders")
    WHY = ""
except (ImportError, OSError, RuntimeError) as error:
    WHY = f"torchcodec is not installed, or finds no FFmpeg: {str(error).splitlines()[0]}"

if not WHY:
    test_torchcodec = kit.suite("torchcodec")


@pytest.mark.skipif(not WHY, reason="torchcodec is installed here")
def test_without_the_library_the_reader_says_what_to_install(reader: Any) -> None:
    with pytest.raises(CvxError, match="torchcodec"):
        reader("torchcodec")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, reader: Any) -> None:
    """A torchcodec that decodes with PyAV, with the same calls."""

    class VideoDecoder:
        def __init__(self, path: str, *, dimension_order: str, num_ffmpeg_threads: int, seek_mode: str):
            assert (dimension_order, seek_mode) == ("NHWC", "exact")
            self.clip = reader("pyav").open(Path(path))

        def __len__(self) -> int:
            return int(self.clip.num_frames)

        def get_frames_at(self, indices: list[int]) -> Any:
            return SimpleNamespace(data=torch.from_numpy(self.clip.frames(indices)))

    package, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    decoders.VideoDecoder = VideoDecoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)


def test_frames_and_refusals_are_those_of_the_other_readers(stand_in: None, reader: Any, encode: Any) -> None:
    path = encode("a.mp4")
    clips = [reader(name).open(path) for name in ("torchcodec", "pyav")]
    np.testing.assert_array_equal(*(clip.frames([0, 3, 3, 25]) for clip in clips))
    assert clips[0].frames([]).shape == (0, 48, 64, 3)
    with pytest.raises(IndexError):
        clips[0].frames([26])
    clips[0].close()
    clips[0].close()
    with pytest.raises(FormatError, match="closed"):
        clips[0].frames([0])
    with pytest.raises(FormatError, match="a rotation of 90 degrees"):
        reader("torchcodec").open(encode("turned.mp4", rotation=90))
