"""From rows to pixels: which frames of a clip are taken, and how frames and images are resized and cropped.

Video files are opened by a reader (`open(path) -> clip`), which comes in as an argument. video_write writes.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cvx_core.errors import FormatError
from cvx_core.interfaces import Reader, Row
from cvx_io.clips import is_still, of_row, read_still

Rule = Literal["fps", "cogvideox"]
Start = Literal["first", "center", "random"]
Short = Literal["error", "repeat"]

_SAME_TIME = 1e-6
"""Seconds; what is less apart is at the same time."""
_REMEDY = "Drop the clip, ask for fewer frames, or let short clips repeat their last frame."
_FRAMES_AT_ONCE = 8  # float32 copies of this many source frames exist while a clip is resized


class ClipTooShort(FormatError):  # noqa: N818 (reads as what it is)
    """A clip has fewer frames than asked for."""


@dataclass(frozen=True)
class Pick:
    """How frames are picked from a clip.

    frames: how many; fps: at which rate, frames per second; rule: see `pick_frames`; start: where the stretch
    lies in a longer clip; skip: frames ignored at both ends; short: whether too short a clip is an error or
    has its last frame repeated.
    """

    frames: int
    fps: float
    rule: Rule = "fps"
    start: Start = "first"
    skip: int = 0
    short: Short = "error"


def pick_frames(
    num_frames: int,
    fps: float,
    pick: Pick,
    generator: torch.Generator | None = None,
    times: Sequence[float] | None = None,
) -> list[int]:
    """Return pick.frames ascending frame indices of a clip of num_frames frames at fps.

    Rule "fps" resamples the clip to pick.fps: frame k is the one shown k / pick.fps seconds after the start,
    the nearest earlier source frame (a slower source repeats frames, as a player would). times: when each
    frame is shown, seconds after the first; None: 1 / fps apart. Rule "cogvideox" is that of the model's
    reference data pipeline, which counts frames whatever their times: whole steps over a stretch behind
    `skip`, then cut or padded by the last frame (source: MindSpeed-MM 2.1.0, CogVideoXProcessor).
    Raises ClipTooShort with the numbers; ValueError where random start lacks its generator.
    """
    if pick.rule == "cogvideox":
        return _pick_cogvideox(num_frames, fps, pick)
    if times is not None:
        return _pick_by_time(times, fps, pick, generator)
    per, of = (_exact(fps) / _exact(pick.fps)).as_integer_ratio()
    span = (pick.frames - 1) * per // of + 1
    spare = num_frames - 2 * pick.skip - span
    if spare < 0 and (pick.short == "error" or num_frames <= 2 * pick.skip):
        raise _too_short(num_frames, fps, pick, span + 2 * pick.skip)
    start = pick.skip + _start(max(spare, 0), pick.start, generator)
    last = num_frames - pick.skip - 1
    return [min(start + k * per // of, last) for k in range(pick.frames)]


def _pick_by_time(
    times: Sequence[float], fps: float, pick: Pick, generator: torch.Generator | None
) -> list[int]:
    """Pick by when frames are shown; the last one is taken to stay for 1 / fps."""
    usable = times[pick.skip : len(times) - pick.skip]
    end = times[-pick.skip] if usable and pick.skip else times[-1] + 1 / fps
    span = (pick.frames - 1) / pick.fps
    starts = bisect.bisect_left(usable, end - span - _SAME_TIME)
    if not usable or (starts == 0 and pick.short == "error"):
        skipped = f", {pick.skip} frames skipped at both ends" if pick.skip else ""
        raise ClipTooShort(
            f"has {len(times)} frames in {times[-1] + 1 / fps:.3g} s, at a rate that varies; {pick.frames} "
            f"frames at {pick.fps:g} fps need more than {span:.3g} s{skipped}. {_REMEDY}"
        )
    first = usable[_start(max(starts - 1, 0), pick.start, generator)]
    instants = (first + k / pick.fps + _SAME_TIME for k in range(pick.frames))
    return [pick.skip + bisect.bisect_right(usable, instant) - 1 for instant in instants]


def _start(spare: int, start: Start, generator: torch.Generator | None) -> int:
    if start == "first":
        return 0
    if start == "center":
        return spare // 2
    if generator is None:
        raise ValueError("a random start needs a generator")
    return int(torch.randint(spare + 1, (), generator=generator))


def _pick_cogvideox(num_frames: int, fps: float, pick: Pick) -> list[int]:
    """Pick as the reference does. `start` has no meaning here, and a short clip is always padded."""
    wanted, skip = pick.frames, pick.skip
    if num_frames / fps * pick.fps > wanted:
        end = int(skip + wanted / pick.fps * fps)
        step = (end - skip) // wanted
        if step == 0:
            raise FormatError(
                f"has {fps:g} fps; rule 'cogvideox' cannot pick {wanted} frames at {pick.fps:g} fps from it, "
                "for it repeats no frames. Use rule 'fps', or a lower fps."
            )
        chosen = list(range(skip, end, step))
        if chosen[-1] >= num_frames:
            raise _too_short(num_frames, fps, pick, chosen[-1] + 1)
    elif num_frames > wanted:
        end = num_frames - skip
        chosen = list(range(skip, end, max((end - skip) // wanted, 1)))
    else:
        usable = num_frames - 2 * skip
        chosen = list(range(skip, skip + (usable - 1) // 4 * 4 + 1)) if usable > 0 else []
    if not chosen:
        raise _too_short(num_frames, fps, pick, 2 * skip + 1)
    return (chosen + [chosen[-1]] * wanted)[:wanted]


@lru_cache(maxsize=256)  # clips of a data set have few rates
def _exact(fps: float) -> Fraction:
    """Return 30000/1001 for 29.97002997, so that no frame is missed by a rounding error."""
    return Fraction(fps).limit_denominator(1001)


def _counted(num_frames: int) -> str:
    return f"{num_frames} frame" if num_frames == 1 else f"{num_frames} frames"


def _too_short(num_frames: int, fps: float, pick: Pick, needed: int) -> ClipTooShort:
    skipped = f", {pick.skip} skipped at both ends" if pick.skip else ""
    return ClipTooShort(
        f"has {_counted(num_frames)} at {fps:g} fps; {pick.frames} frames at {pick.fps:g} fps need {needed}"
        f"{skipped}. {_REMEDY}"
    )


def fit(frames: Any, height: int, width: int) -> Tensor:
    """Return frames (F,H,W,3) uint8 as video (3,F,height,width) float32 in [-1,1].

    Resizes by antialiased bicubic interpolation until both sides are covered, keeping the aspect, and crops
    the centre; frames that have the size already keep their exact values.
    """
    frames = torch.as_tensor(np.asarray(frames))
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(f"expected frames (F,H,W,3) uint8, got {tuple(frames.shape)} {frames.dtype}")
    count, source_height, source_width, _ = frames.shape
    size = _cover(source_height, source_width, height, width)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    video = torch.empty(3, count, height, width)
    for first in range(0, count, _FRAMES_AT_ONCE):
        part = frames[first : first + _FRAMES_AT_ONCE].permute(0, 3, 1, 2).float()
        if size != (source_height, source_width):
            part = functional.interpolate(part, size, mode="bicubic", align_corners=False, antialias=True)
            part = part.clamp(0, 255)  # bicubic weights overshoot at edges
        part = part[:, :, top : top + height, left : left + width]
        video[:, first : first + _FRAMES_AT_ONCE] = part.transpose(0, 1)
    return video.div_(127.5).sub_(1)


def _cover(height: int, width: int, min_height: int, min_width: int) -> tuple[int, int]:
    """Return the size of the same aspect that just covers the wanted one."""
    scale = max(Fraction(min_height, height), Fraction(min_width, width))
    return max(round(height * scale), min_height), max(round(width * scale), min_width)


def read_image(path: Path, height: int, width: int) -> Tensor:
    """Return an image (3,height,width) float32 in [-1,1], upright, fitted like frames. Raises FormatError."""
    return fit(read_still(path)[None], height, width)[:, 0]


class Item(NamedTuple):
    """The pixels of one row. video (3,F,H,W) and image (3,H,W), float32 in [-1,1]; each may be absent.

    encoded: what a row from a cache of features has instead.
    """

    video: Tensor | None = None
    image: Tensor | None = None
    encoded: Any = None


def read_row(
    row: Row,
    reader: Reader | None,
    pick: Pick,
    height: int,
    width: int,
    generator: torch.Generator | None = None,
) -> Item:
    """Return the pixels of a row: its video, and its image where it has one, else the video's first frame.

    Raises FormatError naming the row and the file where one of them cannot be read or is too short.
    """
    video = None
    if row.make is not None:
        video = fit(row.make(pick.frames, height, width), height, width)
    elif row.video is not None and not is_still(row.video):
        if reader is None:
            raise ValueError(f"row {row.id!r} has a video file, and there is no reader")
        video = fit(_read_frames(row, reader, pick, generator), height, width)
    try:
        image = read_image(row.image, height, width) if row.image is not None else None
        if video is None and (still := row.video if row.video is not None else row.image) is not None:
            video = _still_video(still, row, pick, height, width)
    except FormatError as error:
        raise type(error)(f"row {row.id!r}: {error}") from error
    if image is None and video is not None:
        image = video[:, 0]
    return Item(video, image)


def _still_video(path: Path, row: Row, pick: Pick, height: int, width: int) -> Tensor | None:
    """Return a still as a video (3,1,height,width); longer ones are not made of it, unless asked to repeat.

    A row with an image alone, where a clip is asked for, has no video.
    """
    if pick.frames > 1 and row.video is None:
        return None
    if pick.frames > 1 and pick.short == "error":
        raise ClipTooShort(f"{path}: {_too_short(1, pick.fps, pick, pick.frames)}")
    return read_image(path, height, width)[:, None].expand(-1, pick.frames, -1, -1)


def _read_frames(row: Row, reader: Reader, pick: Pick, generator: torch.Generator | None) -> np.ndarray:
    assert row.video is not None
    try:
        with closing(reader.open(row.video)) as clip:
            is_one = clip.num_frames == pick.frames == 1  # nothing to choose from, nor to skip
            indices: Sequence[int] = (
                [0]
                if is_one
                else pick_frames(clip.num_frames, clip.fps, pick, generator, getattr(clip, "times", None))
            )
            return np.asarray(clip.frames(indices))
    except FormatError as error:
        raise of_row(row, row.video, error) from error
