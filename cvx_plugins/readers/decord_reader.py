"""Reading with decord, in the files in which it is exact.

Every other file is refused with the obstacle; the reader `auto` gives those to PyAV.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import decord
import numpy as np

from cvx_core.errors import FormatError
from cvx_plugins.readers import pyav_reader
from cvx_plugins.readers.decord_limits import obstacles
from cvx_plugins.readers.index import Index, scan


class DecordReader:
    """Opens files with decord."""

    name = "decord"

    def __init__(self, threads: int = 1):
        self.threads = threads

    def open(self, path: Path) -> DecordClip:
        """Return an open clip. Raises FormatError where it is no readable video, or decord is not exact."""
        return self.open_index(scan(Path(path)))

    def open_index(self, index: Index) -> DecordClip:
        """Return an open clip of an indexed file."""
        if found := obstacles(index):
            raise FormatError(
                f"{index.path}: decord does not deliver exact frames here: the file has "
                f"{' and '.join(found)}. Use reader: {{use: auto}} or {{use: pyav}}."
            )
        return DecordClip(index, self.threads)

    def check(self, path: Path) -> None:
        """Raise FormatError where a frame is damaged, which decord does not tell."""
        pyav_reader.check(Path(path))


class DecordClip:
    """An open file."""

    def __init__(self, index: Index, threads: int):
        self.num_frames, self.fps = index.num_frames, index.fps
        self.height, self.width = index.height, index.width
        self.times = index.times
        self._index = index
        try:
            self._reader: Any = decord.VideoReader(str(index.path), ctx=decord.cpu(0), num_threads=threads)
        except (decord.DECORDError, RuntimeError) as error:
            raise self._failure(error) from error
        if len(self._reader) != index.num_frames:
            raise FormatError(
                f"{index.path}: decord counts {len(self._reader)} frames, the file shows {index.num_frames}. "
                "Use reader: {use: auto} or {use: pyav}."
            )

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """Return the frames (len(indices),height,width,3) uint8; indices ascend and may repeat.

        Raises IndexError outside the clip, FormatError where a frame cannot be decoded or the clip is closed.
        """
        wanted = self._index.check(indices)
        if self._reader is None:
            raise FormatError(f"{self._index.path}: the clip is closed; open it again.")
        if not wanted:
            return np.empty((0, self.height, self.width, 3), np.uint8)
        unique = sorted(set(wanted))
        try:
            pixels = self._reader.get_batch(unique).asnumpy()
        except (decord.DECORDError, RuntimeError) as error:
            raise self._failure(error) from error
        if len(unique) == len(wanted):
            return pixels
        return pixels[np.searchsorted(unique, wanted)]

    def close(self) -> None:
        """Release the file and the decoder; closing twice is harmless."""
        self._reader = None

    def _failure(self, error: Exception) -> FormatError:
        reason = str(error).strip().splitlines()[0]
        return FormatError(
            f"{self._index.path}: decord cannot decode it: {reason}. The file is truncated or damaged; "
            "fetch it again or drop its row. "
            f"`ffmpeg -v error -i '{self._index.path}' -f null -` shows the place."
        )


def build(cfg: Any, _deps: Any = None) -> DecordReader:
    """Return the reader of a ReaderConfig."""
    return DecordReader(cfg.threads)
