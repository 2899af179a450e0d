"""Readers by name, and clips made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from cvx_core import Registry


@pytest.fixture(scope="session")
def reader() -> Callable[..., Any]:
    """Return readers by name and fields."""
    registry = Registry.discover()

    def made(name: str, **fields: Any) -> Any:
        component = registry.get("reader", name)
        assert component.config is not None
        return component.load()(component.config(**fields), None)

    return made


@pytest.fixture
def encode(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a clip of moving stripes with any codec, container and options."""

    def written(
        file: str,
        codec: str = "libx264",
        pix_fmt: str = "yuv420p",
        num_frames: int = 26,
        fps: Fraction | int = 8,
        size: tuple[int, int] = (48, 64),
        rotation: int = 0,
        **options: str,
    ) -> Path:
        y, x = np.mgrid[: size[0], : size[1]]
        with av.open(str(tmp_path / file), "w") as container:
            stream: Any = container.add_stream(codec, rate=fps)
            stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
            stream.options = {name.replace("_", "-"): value for name, value in options.items()}
            if rotation:
                stream.set_display_rotation(rotation)
            for k in range(num_frames):
                planes = [(x * 3 + k * 5) % 256, (y * 2 + k * 7) % 256, (x + y + k * 11) % 256]
                pixels = np.stack(planes, axis=-1).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        return tmp_path / file

    return written
