"""Writing videos: mp4 with metadata, gif, and contact sheets. Files appear whole or not at all."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cvx_core.errors import FormatError
from cvx_io.atomic import atomic_file

_INK, _PAPER, _MARGIN, _LABEL = (20, 20, 20), (255, 255, 255), 6, 16


def to_uint8(video: Tensor) -> np.ndarray:
    """Return a video (3,F,H,W) in [-1,1] as frames (F,H,W,3) uint8; values outside are clamped.

    Raises FormatError where a value is not finite: such a video would otherwise come out black.
    """
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(f"expected a video (3,F,H,W), got {tuple(video.shape)}")
    bad = int((~torch.isfinite(video)).sum())
    if bad:
        raise FormatError(
            f"video {tuple(video.shape)}: {bad} of {video.numel()} values are not finite. "
            "Nothing was written; decode in float32 or bfloat16, and check the weights."
        )
    frames = video.detach().float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return frames.permute(1, 2, 3, 0).contiguous().cpu().numpy()


def write_mp4(
    path: Path, video: np.ndarray, fps: float, metadata: Mapping[str, Any] | None = None, crf: int = 17
) -> None:
    """Write frames (F,H,W,3) uint8 as H.264, yuv420p; `metadata` is kept as JSON in the comment. The same
    frames make the same file.

    Raises ValueError for odd sizes, which 4:2:0 colour cannot hold, and for no frames.
    """
    frames = _checked(video)
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"{path}: mp4 needs an even size, got {height}x{width}; crop one row or column")
    with (
        atomic_file(Path(path)) as partial,
        av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        if metadata is not None:
            container.metadata["comment"] = json.dumps(metadata, ensure_ascii=False)
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        # With mbtree the encoder's choices depend on what was decoded in this process before.
        stream.options = {"crf": str(crf), "x264-params": "mbtree=0"}
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def read_metadata(path: Path) -> dict[str, Any]:
    """Return what write_mp4 was given as metadata, {} if nothing. Raises FormatError for other files."""
    try:
        with av.open(str(path)) as container:
            comment = container.metadata.get("comment")
        return {} if comment is None else dict(json.loads(comment))
    except (av.error.FFmpegError, ValueError, TypeError) as error:
        raise FormatError(f"{path}: holds no metadata of this program: {error}") from error


def write_gif(path: Path, video: np.ndarray, fps: float) -> None:
    """Write frames (F,H,W,3) uint8 as an endless gif; durations are multiples of 10 ms."""
    data = gif_bytes(video, fps)
    with atomic_file(Path(path)) as partial:
        partial.write_bytes(data)


def gif_bytes(video: np.ndarray, fps: float) -> bytes:
    """Return what write_gif writes."""
    images = [Image.fromarray(pixels) for pixels in _checked(video)]
    # Each frame ends at its true time rounded to the format's unit, so that the rounding does not add up.
    ends = [round(100 * (k + 1) / fps) * 10 for k in range(len(images))]
    durations = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    return buffer.getvalue()


def write_sheet(
    path: Path, clips: Sequence[tuple[str, np.ndarray]], columns: int = 4, frame_width: int = 160
) -> None:
    """Write a contact sheet (png): per clip, a strip of `columns` evenly spaced frames with the label below.

    clips: (label, frames (F,H,W,3) uint8). Strips stand in rows, as many side by side as make the sheet about
    as wide as it is high.
    """
    if not clips:
        raise ValueError(f"{path}: a contact sheet needs at least one clip")
    strips = [(label, _strip(_checked(frames), columns, frame_width)) for label, frames in clips]
    cell_width = strips[0][1].width + 2 * _MARGIN
    cell_height = max(strip.height for _, strip in strips) + _LABEL + _MARGIN
    across = max(1, round(math.sqrt(len(strips) * cell_height / cell_width)))
    size = (across * cell_width, math.ceil(len(strips) / across) * cell_height + _MARGIN)
    sheet = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for number, (label, strip) in enumerate(strips):
        left, top = number % across * cell_width + _MARGIN, number // across * cell_height + _MARGIN
        sheet.paste(strip, (left, top))
        draw.text((left, top + strip.height + 2), shorten(draw, font, label, strip.width), _INK, font)
    with atomic_file(Path(path)) as partial:
        sheet.save(partial, "PNG")


def _strip(frames: np.ndarray, columns: int, width: int) -> Image.Image:
    count, source_height, source_width, _ = frames.shape
    height = max(1, round(source_height * width / source_width))
    strip = Image.new("RGB", (columns * (width + _MARGIN) - _MARGIN, height), _PAPER)
    for column in range(columns):
        frame = frames[round(column * (count - 1) / max(columns - 1, 1))]
        strip.paste(Image.fromarray(frame).resize((width, height)), (column * (width + _MARGIN), 0))
    return strip


def shorten(draw: ImageDraw.ImageDraw, font: Any, label: str, width: int) -> str:
    """Return the label, cut with an ellipsis to the width in pixels."""
    label = " ".join(label.split())
    if draw.textlength(label, font) <= width:
        return label
    while label and draw.textlength(label + "...", font) > width:
        label = label[:-1]
    return label + "..."


def _checked(video: np.ndarray) -> np.ndarray:
    frames = np.ascontiguousarray(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"expected frames (F,H,W,3) uint8, at least one, got {frames.shape} {frames.dtype}")
    return frames
