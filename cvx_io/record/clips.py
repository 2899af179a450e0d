"""Clips as they go into a page: base64 mp4 with a still, up to a limit that is stated."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import av

POSTER_WIDTH = 480
"""Widest still, in pixels."""


@dataclass(frozen=True)
class Limits:
    """What goes into a page at most. clip_bytes: all clips together, before base64."""

    clips: int = 24
    clip_bytes: int = 16_000_000


@dataclass(frozen=True)
class Clip:
    """One clip of a page. video, poster: data URIs."""

    path: Path
    caption: str
    video: str
    poster: str
    text: str


@dataclass(frozen=True)
class Clips:
    """The clips that are shown, and a line for each that is not."""

    shown: tuple[Clip, ...]
    omitted: tuple[str, ...]


def pick(paths: Iterable[Path], limits: Limits) -> Clips:
    """Take clips in the given order as long as the limits allow; a clip that is too large is skipped."""
    shown: list[Clip] = []
    omitted: list[str] = []
    used = 0
    for path in paths:
        size = path.stat().st_size
        if len(shown) == limits.clips:
            omitted.append(f"{path.name}: over the limit of {limits.clips} clips")
        elif used + size > limits.clip_bytes:
            over = f"over the limit of {limits.clip_bytes / 1e6:g} MB for all clips"
            omitted.append(f"{path.name}: {size / 1e6:.1f} MB, {over}")
        else:
            try:
                shown.append(_clip(path))
                used += size
            except (OSError, av.error.FFmpegError, StopIteration) as error:
                omitted.append(f"{path.name}: cannot be decoded: {error or 'it has no picture'}")
    return Clips(tuple(shown), tuple(omitted))


def _clip(path: Path) -> Clip:
    poster, text = _still(path)
    return Clip(
        path=path,
        caption=_caption(path),
        video=_uri("video/mp4", path.read_bytes()),
        poster=_uri("image/jpeg", poster),
        text=text,
    )


def _still(path: Path) -> tuple[bytes, str]:
    """Return the clip's middle frame as JPEG, and its frames, size and rate in words."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0] if container.streams.video else None
        if stream is None:
            raise StopIteration
        count, middle = 0, next(frames := container.decode(stream))
        for count, frame in enumerate(frames, start=1):
            middle = frame if count <= stream.frames // 2 else middle
        rate = f" at {float(stream.average_rate):g} fps" if stream.average_rate else ""
        image = middle.to_image()
    size = f"{count + 1} frames of {image.height}x{image.width}{rate}"
    if image.width > POSTER_WIDTH:
        image = image.resize((POSTER_WIDTH, round(image.height * POSTER_WIDTH / image.width)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue(), size


def _caption(path: Path) -> str:
    """Return the prompt that the record beside a clip states, else its file name."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return path.name
    prompt = record.get("prompt") if isinstance(record, dict) else None
    return prompt if isinstance(prompt, str) and prompt else path.name


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
