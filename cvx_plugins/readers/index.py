"""The frame index of a video file: which frames it shows, in which order, and where decoding can start.

It is made by reading packets, without decoding more than the first frame, and is the same for every reader.
"""

from __future__ import annotations

import bisect
import itertools
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av

from cvx_core.errors import FormatError
from cvx_io.members import address, is_there, num_bytes

UNTIMED_CONTAINERS = ("avi",)  # their timestamps count packets in decoding order, not frames as shown
ALLOWED_GAP_S = 1.0


@dataclass(frozen=True)
class Index:
    """What is known about a file before its pixels.

    num_frames: exact; fps: average; height, width: as shown, after rotation; rotation: degrees
    counter-clockwise that turn a decoded frame upright; pts: timestamp of each frame in the order shown, None
    where the container has none worth trusting; tick: seconds of one unit of pts; keys: the frames at which
    decoding can start; container: its short name; bits: per colour component; is_plain: whether every packet
    is shown, and none before the key frame it follows.
    """

    path: Path
    num_frames: int
    fps: float
    height: int
    width: int
    rotation: int
    pts: tuple[int, ...] | None
    tick: Fraction
    keys: tuple[int, ...]
    container: str
    bits: int
    is_plain: bool

    @property
    def is_steady(self) -> bool:
        """Whether every frame is shown within half a frame of when it would be at `fps`; so where none has a
        time.
        """
        usual = 1 / (self.fps * float(self.tick))
        return self.pts is None or all(
            abs(pts - self.pts[0] - i * usual) <= usual / 2 for i, pts in enumerate(self.pts)
        )

    @property
    def times(self) -> tuple[float, ...] | None:
        """When each frame is shown, seconds after the first; None where they follow from the rate."""
        if self.pts is None or self.is_steady:
            return None
        return tuple(float((pts - self.pts[0]) * self.tick) for pts in self.pts)

    def key_before(self, frame: int) -> int:
        """Return the last frame at or before `frame` at which decoding can start."""
        return self.keys[bisect.bisect_right(self.keys, frame) - 1]

    def check(self, indices: Sequence[int]) -> list[int]:
        """Return the indices as a list. Raises IndexError unless they ascend within the clip."""
        wanted = [int(i) for i in indices]
        if any(a > b for a, b in itertools.pairwise(wanted)):
            raise IndexError(f"{self.path}: frame indices must ascend; got {wanted}")
        if wanted and (wanted[0] < 0 or wanted[-1] >= self.num_frames):
            raise IndexError(
                f"{self.path}: frames {wanted[0]}..{wanted[-1]} of a clip of {self.num_frames} frames"
            )
        return wanted


class Packet(NamedTuple):
    """One coded frame, in decoding order."""

    pts: int | None
    duration: int
    is_key: bool
    is_discard: bool


def scan(path: Path) -> Index:
    """Return the index of a file. Raises FormatError where it is missing, no video, truncated or damaged."""
    index, container = scan_open(path)
    container.close()
    return index


def scan_open(path: Path) -> tuple[Index, Any]:
    """Return the index of a file, and its container, which was read to its end. Raises as `scan` does."""
    if not is_there(path):
        raise FormatError(f"{path}: no such video file. Check the path in the dataset's index.")
    if num_bytes(path) == 0:
        raise FormatError(f"{path}: the file is empty. Copy or download it again.")
    with explained(path):
        container = av.open(address(path))
    try:
        return _indexed(container, path), container
    except BaseException:
        container.close()
        raise


def _indexed(container: Any, path: Path) -> Index:
    """Read all packets of an open container; return what they say."""
    with explained(path):
        stream = video_stream(container, path)
        stream.codec_context.thread_count = 1  # more would decode several frames to give one
        packets, frame = _packets(container, stream, path)
        _check_complete(container, stream, packets, path)
        container_name = container.format.name.split(",")[0]
        tick = stream.time_base
        bits = max(component.bits for component in stream.codec_context.format.components)
        fps = stream.average_rate or stream.guessed_rate
    if not fps:
        raise FormatError(f"{path}: the stream states no frame rate. {_REMUX.format(path=path)}")
    height, width, rotation = _geometry(frame, path)
    pts, keys, is_plain = _order(packets, container_name)
    return Index(
        path=path,
        num_frames=len(pts) if pts is not None else len(packets),
        fps=float(fps),
        height=height,
        width=width,
        rotation=rotation,
        pts=pts,
        tick=tick,
        keys=keys,
        container=container_name,
        bits=bits,
        is_plain=is_plain,
    )


_REMUX = "Write it anew: ffmpeg -i '{path}' -c:v libx264 -crf 12 -an fixed.mp4"


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn every error of the library into a FormatError that names the file and a remedy."""
    try:
        yield
    except PermissionError as error:
        raise FormatError(
            f"{path}: may not be read: {error.strerror}. Allow that (chmod), or drop its row."
        ) from error
    except av.error.FFmpegError as error:
        raise FormatError(
            f"{path}: cannot be decoded as video: {error.strerror or error}. It is truncated, damaged or "
            "no video; fetch it again or drop its row. "
            f"`ffmpeg -v error -i '{path}' -f null -` shows the place."
        ) from error


def video_stream(container: Any, path: Path) -> Any:
    """Return the first video stream of an open container."""
    if not container.streams.video:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise FormatError(f"{path}: has no video stream, only {kinds}. Drop its row or name the right file.")
    return container.streams.video[0]


def _packets(container: Any, stream: Any, path: Path) -> tuple[list[Packet], Any]:
    """Return all packets, and the first frame that can be decoded, None where there is none."""
    packets: list[Packet] = []
    frame = None
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise FormatError(
                f"{path}: truncated or damaged: packet {len(packets)} is incomplete"
                + (f" (the file states {stream.frames} frames)" if stream.frames else "")
                + ". Copy or download the file again."
            )
        if packet.size:
            packets.append(Packet(packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard))
        if frame is None and (packet.size or packet.dts is None):  # else a placeholder
            frame = next(iter(packet.decode()), None)
    if not any(packet.is_key for packet in packets):
        raise FormatError(
            f"{path}: its video stream holds no frame that can be decoded on its own. Drop its row."
        )
    return packets, frame


def _check_complete(container: Any, stream: Any, packets: list[Packet], path: Path) -> None:
    """Compare what was read with the duration the file states: a cut file may end without any other sign."""
    timed = [packet for packet in packets if packet.pts is not None]
    only_video = len(container.streams) == 1
    if stream.duration is not None:
        stated = float(stream.duration * stream.time_base)
    elif container.duration is not None and only_video:
        stated = container.duration / av.time_base
    else:
        return
    if not timed:
        return
    first = min(packet.pts for packet in timed if packet.pts is not None)
    last = max(packet.pts + packet.duration for packet in timed if packet.pts is not None)
    found = float((last - first) * stream.time_base)
    if stated - found > max(ALLOWED_GAP_S, 0.02 * stated):
        raise FormatError(
            f"{path}: truncated: the file states {stated:.2f} s of video, {found:.2f} s ({len(packets)} "
            "frames) are there. Copy or download it again."
        )


def _geometry(frame: Any, path: Path) -> tuple[int, int, int]:
    """Return height and width as shown, and the rotation, from the first decodable frame."""
    if frame is None:
        raise FormatError(
            f"{path}: no frame of its video stream can be decoded. Fetch it again or drop its row."
        )
    if _is_mirrored(frame):
        raise FormatError(f"{path}: is mirrored by its display matrix. {_REMUX.format(path=path)}")
    if frame.rotation % 90:
        raise FormatError(f"{path}: is rotated by {frame.rotation} degrees; only quarter turns are read.")
    rotation = frame.rotation % 360
    height, width = (frame.width, frame.height) if rotation % 180 else (frame.height, frame.width)
    return height, width, rotation


def _is_mirrored(frame: Any) -> bool:
    """Whether a frame is shown as in a mirror, which FFmpeg does not tell from a rotation."""
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(side))
    return bool(a * d - b * c < 0)


def _order(packets: list[Packet], container: str) -> tuple[tuple[int, ...] | None, tuple[int, ...], bool]:
    """Return timestamps as shown, frames to start at, and whether packets and frames correspond plainly."""
    first_key = next(i for i, packet in enumerate(packets) if packet.is_key)
    known = [packet.pts for packet in packets if packet.pts is not None]
    if container in UNTIMED_CONTAINERS or len(set(known)) < len(packets):
        return None, (0,), False
    start = packets[first_key].pts
    assert start is not None
    # What comes before the first key frame, in decoding order or in time, cannot be decoded.
    usable = [packet for packet in packets[first_key:] if packet.pts is not None and packet.pts >= start]
    pts = sorted(packet.pts for packet in usable if packet.pts is not None and not packet.is_discard)
    keys = {
        bisect.bisect_left(pts, packet.pts) for packet in usable if packet.is_key and packet.pts is not None
    }
    keys.add(0)
    is_plain = len(pts) == len(packets) and not _has_leading_frames(packets)
    return tuple(pts), tuple(sorted(key for key in keys if key < len(pts))), is_plain


def _has_leading_frames(packets: list[Packet]) -> bool:
    """Whether some frame is decoded after a key frame but shown before it."""
    key_pts = None
    for packet in packets:
        if packet.is_key:
            key_pts = packet.pts
        elif key_pts is not None and packet.pts is not None and packet.pts < key_pts:
            return True
    return False
