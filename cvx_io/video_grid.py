"""Videos side by side as one mp4: a row per prompt, a column per model. Reads back what was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cvx_core.errors import FormatError
from cvx_io.video_write import shorten, write_mp4

_INK, _PAPER, _MISSING = (20, 20, 20), (255, 255, 255), (120, 120, 120)
_MARGIN, _LABEL = 6, 16
LONGEST, NARROWEST = 480, 160
"""Pixels of the longer side of a video in a grid, and of its width; words need some room."""


class GridRow(NamedTuple):
    """A label, and of each column its frames (F,H,W,3) uint8; None where there is no video."""

    label: str
    cells: Sequence[np.ndarray | None]


def read_mp4(path: Path) -> tuple[np.ndarray, float]:
    """Return frames (F,H,W,3) uint8 and their rate. Raises FormatError where the file is none of videos."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            rate = float(stream.average_rate or 1)
    except (OSError, IndexError, av.error.FFmpegError) as error:
        raise FormatError(
            f"{path}: cannot be read as a video: {error}. Remove it, and sample it anew."
        ) from error
    if not frames:
        raise FormatError(f"{path}: holds no frame. Remove it, and sample it anew.")
    return np.stack(frames), rate


def smaller(frames: np.ndarray, longest: int = LONGEST) -> np.ndarray:
    """Return frames (F,H,W,3) of an even size whose longer side is `longest` pixels at most."""
    height, width = frames.shape[1:3]
    share = min(1.0, longest / max(height, width))
    size = (max(2, int(width * share) // 2 * 2), max(2, int(height * share) // 2 * 2))
    if size == (width, height):
        return frames
    return np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in frames])


def write_grid(
    path: Path,
    columns: Sequence[str],
    rows: Sequence[GridRow],
    fps: float,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write videos as one, each under its column's name and over its row's label.

    Large videos are made smaller, and tiny ones larger by whole factors. A video that is missing is a grey
    field; a shorter one stays on its last frame. Raises ValueError where there is no video at all.
    """
    shown = [
        GridRow(row.label, [_fitted(cell) if cell is not None else None for cell in row.cells])
        for row in rows
    ]
    videos = [cell for row in shown for cell in row.cells if cell is not None]
    if not videos:
        raise ValueError(f"{path}: a grid needs at least one video")
    count = max(len(video) for video in videos)
    height, width = (max(video.shape[i] for video in videos) for i in (1, 2))
    canvas, places = _canvas(columns, [row.label for row in shown], height, width)
    grid = np.repeat(canvas[None], count, axis=0)
    for row, at_row in zip(shown, places, strict=True):
        for cell, (top, left) in zip(row.cells, at_row, strict=True):
            if cell is None:
                grid[:, top : top + height, left : left + width] = _MISSING
                continue
            last = np.minimum(np.arange(count), len(cell) - 1)
            grid[:, top : top + cell.shape[1], left : left + cell.shape[2]] = cell[last]
    write_mp4(path, grid, fps, metadata)


def _fitted(frames: np.ndarray) -> np.ndarray:
    factor = max(1, NARROWEST // frames.shape[2])
    return smaller(frames) if factor == 1 else frames.repeat(factor, axis=1).repeat(factor, axis=2)


def _canvas(
    columns: Sequence[str], labels: Sequence[str], height: int, width: int
) -> tuple[np.ndarray, list[list[tuple[int, int]]]]:
    """Return the still with all words (H,W,3), and where the videos go: of each row the (top, left)."""
    cell = height + _LABEL + _MARGIN
    across, down = len(columns) * (width + _MARGIN) + _MARGIN, _LABEL + _MARGIN + len(labels) * cell
    image = Image.new("RGB", (across + across % 2, down + down % 2), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    lefts = [_MARGIN + number * (width + _MARGIN) for number in range(len(columns))]
    tops = [_LABEL + _MARGIN + number * cell for number in range(len(labels))]
    for name, left in zip(columns, lefts, strict=True):
        draw.text((left, 3), shorten(draw, font, name, width), _INK, font)
    for label, top in zip(labels, tops, strict=True):
        draw.text(
            (lefts[0], top + height + 2), shorten(draw, font, label, image.width - 2 * _MARGIN), _INK, font
        )
    return np.asarray(image), [[(top, left) for left in lefts] for top in tops]
