"""A dataset that needs no files: shapes that move over a gradient, with captions that say so."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from cvx_core.interfaces import Row
from cvx_plugins.datasets.config import SyntheticConfig

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 70),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 60),
    "white": (245, 245, 245),
}
MOTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0), "diagonally": (1, 1)}
SHAPES = ("circle", "square", "ring")
PACES = {"slowly": 0.2, "quickly": 0.45}


@dataclass(frozen=True)
class Drawing:
    """One video as a function of its size; lengths are fractions of the shorter side."""

    shape: str
    colour: str
    motion: str
    pace: str
    radius: float
    tint: int

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.motion} {self.pace}"

    def __call__(self, frames: int, height: int, width: int) -> Any:
        """Return the video (frames,height,width,3) uint8."""
        import numpy as np

        y, x = np.mgrid[0:height, 0:width].astype(np.float64)
        shade = 40 + 60 * (x / max(width - 1, 1) + y / max(height - 1, 1)) / 2
        ground = np.stack([shade + self.tint * k for k in range(3)], axis=-1)
        side = min(height, width)
        video = np.empty((frames, height, width, 3), np.uint8)
        for f in range(frames):
            phase = f / max(frames - 1, 1) - 0.5
            down, right = (direction * PACES[self.pace] * 2 * phase for direction in MOTIONS[self.motion])
            away = (
                ((y + 0.5) / height - 0.5 - down) * height / side,
                ((x + 0.5) / width - 0.5 - right) * width / side,
            )
            video[f] = np.where(self._inside(*away)[..., None], COLOURS[self.colour], ground)
        return video

    def _inside(self, down: Any, right: Any) -> Any:
        if self.shape == "square":
            return (abs(down) < self.radius) & (abs(right) < self.radius)
        distance = (down**2 + right**2) ** 0.5
        return (distance < self.radius) & ((self.shape == "circle") | (distance > self.radius * 0.55))


class Synthetic:
    """Rows of drawings that depend on the seed alone."""

    def __init__(self, cfg: SyntheticConfig, deps: Any = None):
        self.cfg = cfg

    def rows(self) -> tuple[Row, ...]:
        """Return the rows; drawing happens when a row's `make` is called."""
        digits = max(4, math.ceil(math.log10(self.cfg.rows + 1)))
        return tuple(self._row(i, digits) for i in range(self.cfg.rows))

    def _row(self, i: int, digits: int) -> Row:
        draw = random.Random(f"{self.cfg.seed}/{i}")
        drawing = Drawing(
            shape=draw.choice(SHAPES),
            colour=draw.choice(list(COLOURS)),
            motion=draw.choice(list(MOTIONS)),
            pace=draw.choice(list(PACES)),
            radius=draw.uniform(0.15, 0.3),
            tint=draw.randrange(0, 40),
        )
        return Row(f"synthetic-{i:0{digits}d}", (drawing.caption,), make=drawing)
