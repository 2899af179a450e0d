"""Reading with torchcodec, in the files in which it is taken to be exact: see decord_limits, and no rotation.

Every other file is refused with the obstacle; the reader `auto` and `pyav` read those.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cvx_core.errors import CvxError, FormatError
from cvx_plugins.readers import pyav_reader
from cvx_plugins.readers.decord_limits import obstacles
from cvx_plugins.readers.index import Index, scan


class TorchcodecReader:
    """Opens files with torchcodec."""

    name = "torchcodec"

    def __init__(self, threads: int = 1):
        """Raises CvxError where torchcodec, or what it needs, is not there."""
        try:
            from torchcodec.decoders import VideoDecoder
        except (ImportError, OSError, RuntimeError) as error:
            raise CvxError(
                f"reader torchcodec: {str(error).splitlines()[0]}. Install torchcodec and the FFmpeg that it "
                "needs (`pip install cvx[torchcodec]`), or use reader: {use: auto}."
            ) from error
        self.threads, self._decoder = threads, VideoDecoder

    def open(self, path: Path) -> TorchcodecClip:
        """Return an open clip. Raises FormatError where it is no readable video, or may not be exact."""
        index = scan(Path(path))
        found = obstacles(index)
        if index.rotation:
            found = (*found, f"a rotation of {index.rotation} degrees")
        if found:
            raise FormatError(
                f"{index.path}: torchcodec is not used here: the file has {' and '.join(found)}. "
                "Use reader: {use: auto} or {use: pyav}."
            )
        return TorchcodecClip(index, self._decoder, self.threads)

    def check(self, path: Path) -> None:
        """Raise FormatError where a frame is damaged, which torchcodec does not tell."""
        pyav_reader.check(Path(path))


class TorchcodecClip:
    """An open file."""

    def __init__(self, index: Index, decoder: Any, threads: int):
        self.num_frames, self.fps = index.num_frames, index.fps
        self.height, self.width = index.height, index.width
        self.times = index.times
        self._index = index
        try:
            self._decoder: Any = decoder(
                str(index.path), dimension_order="NHWC", num_ffmpeg_threads=threads, seek_mode="exact"
            )
        except (RuntimeError, ValueError) as error:
            raise self._failure(error) from error
        if len(self._decoder) != index.num_frames:
            raise FormatError(
                f"{index.path}: torchcodec counts {len(self._decoder)} frames, the file shows "
                f"{index.num_frames}. Use reader: {{use: auto}} or {{use: pyav}}."
            )

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """Return the frames (len(indices),height,width,3) uint8; indices ascend and may repeat.

        Raises IndexError outside the clip, FormatError where a frame cannot be decoded or the clip is closed.
        """
        wanted = self._index.check(indices)
        if self._decoder is None:
            raise FormatError(f"{self._index.path}: the clip is closed; open it again.")
        if not wanted:
            return np.empty((0, self.height, self.width, 3), np.uint8)
        try:
            pixels: np.ndarray = self._decoder.get_frames_at(wanted).data.numpy()
        except (RuntimeError, ValueError) as error:
            raise self._failure(error) from error
        return pixels

    def close(self) -> None:
        """Release the file and the decoder; closing twice is harmless."""
        self._decoder = None

    def _failure(self, error: Exception) -> FormatError:
        reason = str(error).strip().splitlines()[0]
        return FormatError(
            f"{self._index.path}: torchcodec cannot decode it: {reason}. The file is truncated or damaged; "
            "fetch it again or drop its row."
        )


def build(cfg: Any, _deps: Any = None) -> TorchcodecReader:
    """Return the reader of a ReaderConfig."""
    return TorchcodecReader(cfg.threads)
