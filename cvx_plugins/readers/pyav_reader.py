"""Frame-exact reading with PyAV: decode from the nearest key frame, know every frame by its timestamp."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from cvx_core.errors import FormatError
from cvx_io.members import address
from cvx_plugins.readers.index import Index, explained, scan_open, video_stream


class PyavReader:
    """Opens files with PyAV."""

    name = "pyav"

    def __init__(self, threads: int = 1):
        self.threads = threads

    def open(self, path: Path) -> PyavClip:
        """Return an open clip. Raises FormatError where the file is no readable video."""
        return PyavClip(*scan_open(Path(path)), self.threads)

    def open_index(self, index: Index, container: Any) -> PyavClip:
        """Return an open clip of an indexed file and its container."""
        return PyavClip(index, container, self.threads)


class PyavClip:
    """An open file. Reading on from the last frame costs no seek."""

    def __init__(self, index: Index, container: Any, threads: int):
        self.num_frames, self.fps = index.num_frames, index.fps
        self.height, self.width = index.height, index.width
        self.times = index.times
        self._index = index
        self._threads = threads
        self._ordinals = None if index.pts is None else {pts: i for i, pts in enumerate(index.pts)}
        self._reformatter = VideoReformatter()
        self._container = container
        self._decoded: Iterator[tuple[int, Any]] = iter(())  # frames to come, with their ordinals
        self._current: tuple[int, Any] = (-1, None)  # the last of them taken
        if threads != 1:  # those that a container was scanned with
            self._open()

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """Return the frames (len(indices),height,width,3) uint8; indices ascend and may repeat.

        Raises IndexError outside the clip, FormatError where a frame cannot be decoded or the clip is closed.
        """
        wanted = self._index.check(indices)
        out = np.empty((len(wanted), self.height, self.width, 3), np.uint8)
        for slot, ordinal in enumerate(wanted):
            if slot and ordinal == wanted[slot - 1]:
                out[slot] = out[slot - 1]
            else:
                out[slot] = self._pixels(self.decode(ordinal))
        return out

    def decode(self, ordinal: int) -> Any:
        """Return one decoded frame, reading on where that is shorter than starting at a key frame.

        Raises FormatError where it cannot be decoded or the clip is closed.
        """
        if self._container is None:
            raise FormatError(f"{self._index.path}: the clip is closed; open it again.")
        position = self._current[0]
        key = self._index.key_before(ordinal)
        with explained(self._index.path):
            if position < 0 or ordinal < position or key > position + 1:
                self._decoded = self._decode(self._packets_from(key), key)
                position = key - 1
            while position < ordinal:
                position += 1
                self._current = next(self._decoded, (-1, None))
                if self._current[0] != position:
                    raise self._lost(position)
        return self._current[1]

    def close(self) -> None:
        """Release the file and the decoder; closing twice is harmless."""
        self._decoded, self._current = iter(()), (-1, None)
        if self._container is not None:
            self._container.close()
            self._container = None

    def _open(self) -> None:
        if self._container is not None:
            self._container.close()
        with explained(self._index.path):
            self._container = av.open(address(self._index.path))
        stream = video_stream(self._container, self._index.path)
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = self._threads

    def _lost(self, ordinal: int) -> FormatError:
        self._decoded, self._current = iter(()), (-1, None)
        return FormatError(
            f"{self._index.path}: frame {ordinal} of {self.num_frames} is in the file but cannot be decoded. "
            "The file is damaged; fetch it again or drop its row."
        )

    def _decode(self, packets: Iterator[Any], key: int) -> Iterator[tuple[int, Any]]:
        """Yield (ordinal, frame) of the packets, from frame `key` on."""
        count = 0
        for packet in packets:
            if not packet.size and packet.dts is not None:  # a placeholder; decoding it would end the stream
                continue
            for frame in packet.decode():
                ordinal = count if self._ordinals is None else self._ordinals.get(frame.pts, -1)
                count += 1
                if ordinal < key:  # on the way to the key frame, or referring to what lies before it
                    continue
                if frame.is_corrupt:
                    raise self._lost(ordinal)
                yield ordinal, frame

    def _packets_from(self, key: int) -> Iterator[Any]:
        """Return the packets from a point at or before frame `key` at which decoding can start."""
        pts = self._index.pts
        for start in reversed([k for k in self._index.keys if k <= key] if pts is not None else []):
            assert pts is not None
            stream = video_stream(self._container, self._index.path)
            self._container.seek(pts[start], stream=stream)
            packets = self._container.demux(stream)
            first = next(packets, None)
            # Containers seek by decoding time, so the place reached may lie behind the one asked for.
            if first is not None and first.is_keyframe and first.pts is not None and first.pts <= pts[key]:
                return _chain(first, packets)
        self._open()
        return self._container.demux(video_stream(self._container, self._index.path))

    def _pixels(self, frame: Any) -> np.ndarray:
        pixels = self._reformatter.reformat(frame, format="rgb24").to_ndarray()
        pixels = np.rot90(pixels, self._index.rotation // 90) if self._index.rotation else pixels
        if pixels.shape[:2] != (self.height, self.width):
            raise FormatError(
                f"{self._index.path}: the frame size changes from {self.height}x{self.width} to "
                f"{pixels.shape[0]}x{pixels.shape[1]} within the clip. Split the clip, or drop its row."
            )
        return pixels


def check(path: Path) -> None:
    """Decode a whole file. Raises FormatError at a frame that is damaged or missing."""
    clip = PyavReader().open(path)
    try:
        for ordinal in range(clip.num_frames):
            clip.decode(ordinal)
    finally:
        clip.close()


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def build(cfg: Any, _deps: Any = None) -> PyavReader:
    """Return the reader of a ReaderConfig."""
    return PyavReader(cfg.threads)
