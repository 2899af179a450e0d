"""What is known of a clip before its pixels: number of frames, rate and size. No torch."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from cvx_core.errors import FormatError
from cvx_core.interfaces import Clip, Reader, Row
from cvx_io.members import open_binary


def read_still(path: Path) -> np.ndarray:
    """Return an image (H,W,3) uint8, upright. Raises FormatError."""
    try:
        with open_binary(path) as file, Image.open(file) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise FormatError(
            f"{path}: cannot be read as an image: {error}. Fetch it again or drop its row."
        ) from error


IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


class Facts(NamedTuple):
    """What is known of a clip before its pixels.

    is_drawn: it has no size or length of its own; times: when each frame is shown, seconds after the first,
    where that does not follow from fps, which then is the average.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    is_drawn: bool = False
    times: tuple[float, ...] | None = None


def is_still(path: Path) -> bool:
    """Tell from its name whether a file is an image: a clip of one frame."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def probe(row: Row, reader: Reader) -> Facts:
    """Return the facts of a row's clip. Raises FormatError naming file and cause where there are none."""
    if row.make is not None:
        return Facts(2, 1, 9, 16, is_drawn=True)
    path = row.video if row.video is not None else row.image
    if path is None:
        raise FormatError(f"row {row.id!r} has neither video nor image. Drop it, or use a dataset of clips.")
    if is_still(path):
        height, width = read_still(path).shape[:2]
        return Facts(1, 1, height, width)
    try:
        with closing(reader.open(path)) as clip:
            return facts_of(clip)
    except FormatError as error:
        raise of_row(row, path, error) from error


def facts_of(clip: Clip) -> Facts:
    """Return the facts of an open clip; a reader that knows no times takes the rate for steady."""
    times = getattr(clip, "times", None)
    return Facts(clip.num_frames, clip.fps, clip.height, clip.width, times=times)


def of_row(row: Row, path: Path, error: FormatError) -> FormatError:
    """Return an error of the same type that names the row and the file."""
    file = "" if str(path) in str(error) else f"{path} "
    return type(error)(f"row {row.id!r}: {file}{error}")
