"""Where a token is and when: time sinusoids, the fixed position table, and rotary tables over a patch grid.

One-dimensional tables are made on the CPU, so that every device gets the same numbers, and spread over the
grid where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cvx_plugins.cogvideox.names import FREQUENCIES, POSITIONS
from cvx_plugins.cogvideox.predictor_config import CogVideoXConfig

Grid = tuple[int, int, int]
Rope = tuple[Tensor, Tensor]

BASE = 10000.0
"""Ratio of the longest wavelength to the shortest, for time and for every position."""


class Tables:
    """The tables of one model, made when a grid first comes up and kept for a few grids."""

    KEPT = 8

    def __init__(self, cfg: CogVideoXConfig):
        self.cfg = cfg
        self._made: dict[Any, Any] = {}

    def rope(self, grid: Grid, device: torch.device) -> Rope | None:
        """Return what turns queries and keys, (cos, sin), each (S,K) float32; None where nothing does."""
        if self.cfg.positions == "sincos":
            return None
        return self._once(("rope", grid, device), lambda: self._rope(grid, device))

    def fixed(self, grid: Grid, like: Tensor) -> Tensor | None:
        """Return what is added to video tokens, (S,D), in the dtype and on the device of `like`, or None."""
        cfg = self.cfg
        if cfg.positions != "sincos":
            return None
        scales = (cfg.spatial_interpolation_scale, cfg.temporal_interpolation_scale)
        key = ("fixed", grid, like.device, like.dtype)
        return self._once(
            key, lambda: sincos_table(grid, cfg.width, *scales, device=like.device).to(like.dtype)
        )

    def _rope(self, grid: Grid, device: torch.device) -> Rope:
        fitted = self.cfg.rope_grid == "resize"
        coordinates = fitted_coordinates(grid, self.cfg.sample_grid) if fitted else own_coordinates(grid)
        return rope_table(coordinates, self.cfg.head_dim, device)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            if len(self._made) == self.KEPT:
                self._made.clear()
            with torch.inference_mode(False):  # a table made while sampling must also serve training
                self._made[key] = make()
        return self._made[key]


def stored_tables(cfg: CogVideoXConfig) -> dict[str, Callable[[], Tensor]]:
    """Return what files of other worlds hold of a model's tables, over its sample grid, float32, by name.

    1.0 with fixed positions: the table with zero rows for the text, (1,L+S,D). 1.0 with rotary positions:
    cosines and sines (S,K), without the signs that `rotate` wants. 1.5: nothing.
    """
    if cfg.positions == "sincos":
        return {POSITIONS: lambda: _with_text(cfg)}
    if cfg.patch_t is not None:
        return {}
    sin, cos = FREQUENCIES
    return {
        sin: lambda: _unsigned(rope_table(own_coordinates(cfg.sample_grid), cfg.head_dim)[1]),
        cos: lambda: rope_table(own_coordinates(cfg.sample_grid), cfg.head_dim)[0],
    }


def _with_text(cfg: CogVideoXConfig) -> Tensor:
    scales = (cfg.spatial_interpolation_scale, cfg.temporal_interpolation_scale)
    table = sincos_table(cfg.sample_grid, cfg.width, *scales)
    return F.pad(table, (0, 0, cfg.text_length, 0))[None]


def _unsigned(sin: Tensor) -> Tensor:
    """Undo the minus that a rotary table has at even features."""
    return sin * sin.new_tensor([-1.0, 1.0]).repeat(sin.shape[-1] // 2)


def sinusoid(timestep: Tensor, width: int) -> Tensor:
    """Return cosines, then sines, of timestep (B,) at width/2 frequencies: (B,width) float32.

    Source: Ho et al. 2020 (arXiv 2006.11239), after Vaswani et al. 2017, section 3.5.
    """
    angle = timestep.float()[:, None] * frequencies(width // 2, timestep.device)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def frequencies(count: int, device: torch.device) -> Tensor:
    """Return BASE^(-k/count) for k < count, float32: float32 exponents, as the models were trained with.

    A last bit here is worth 1e-5 in a prediction at high timesteps, and processors round exp() differently
    where the value lies between two floats. So it is taken in float64, and such near ties go up, as in the
    outputs recorded of the original code.
    """
    steps = torch.arange(count, dtype=torch.float32)
    exact = torch.exp((-math.log(BASE) * steps / count).double())
    return (exact * (1 + 2**-29)).float().to(device)


def sincos_table(
    grid: Grid, width: int, spatial_scale: float, time_scale: float, device: torch.device | None = None
) -> Tensor:
    """Return the table (S,width) float32 of a grid: a quarter is time, then columns, then rows.

    A position is divided by its scale in float32, as the original does; the rest is computed in float64.
    width: a multiple of 16.
    """
    widths, scales = (width // 4, width // 8 * 3, width // 8 * 3), (time_scale, spatial_scale, spatial_scale)
    frames, rows, columns = (
        _sincos((torch.arange(count, dtype=torch.float32, device="cpu") / scale).double(), part).to(device)
        for count, part, scale in zip(grid, widths, scales, strict=True)
    )
    return _spread(grid, ((0, frames), (2, columns), (1, rows)))


def rope_table(coordinates: Sequence[Tensor], head_dim: int, device: torch.device | None = None) -> Rope:
    """Return cos and sin (S,K) float32 that `rotate` takes, for coordinates of frames, rows and columns.

    A quarter of the head turns with time, 3/8 with rows, 3/8 with columns. The sine is negative at even
    features. Source: Su et al. 2021 (arXiv 2104.09864), equation 34, on three axes.
    """
    grid = tuple(len(axis) for axis in coordinates)
    widths = (head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)
    angles = [
        torch.outer(axis, 1.0 / BASE ** (torch.arange(0, part, 2, dtype=torch.float32, device="cpu") / part))
        for axis, part in zip(coordinates, widths, strict=True)
    ]
    cos = [angle.cos().repeat_interleave(2, dim=-1).to(device) for angle in angles]
    sin = [torch.stack((-angle.sin(), angle.sin()), dim=-1).flatten(-2).to(device) for angle in angles]
    return _spread(grid, list(enumerate(cos))), _spread(grid, list(enumerate(sin)))


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each adjacent pair of features of x (B,S,N,K) by its token's angle; float32 inside."""
    cos, sin = (table.unsqueeze(1) for table in rope)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def for_text_too(rope: Rope, length: int) -> Rope:
    """Put rows that turn nothing before the tables, so that they cover `length` tokens, text first."""
    rows = (0, 0, length - len(rope[0]), 0)
    return F.pad(rope[0], rows, value=1.0), F.pad(rope[1], rows)


def own_coordinates(grid: Grid) -> list[Tensor]:
    """Return the patch indices of a clip, counted from its first frame and its corner."""
    return [torch.arange(count, dtype=torch.float32, device="cpu") for count in grid]


def fitted_coordinates(grid: Grid, sample: Grid) -> list[Tensor]:
    """Return where a clip's patches lie in the sample grid, once scaled to fit into it and centred.

    Frames keep their indices. Scaled sizes and margins are rounded to whole patches.
    """
    frames, *_ = own_coordinates(grid)
    (_, height, width), (_, sample_height, sample_width) = grid, sample
    if height / width > sample_height / sample_width:
        fitted = sample_height, round(sample_height / height * width)
    else:
        fitted = round(sample_width / width * height), sample_width
    spatial = []
    for count, size, room in zip((height, width), fitted, (sample_height, sample_width), strict=True):
        first = round((room - size) / 2)
        # The end of the span, margin included, shrinks by one part in `count`; so do the models' own tables.
        spatial.append(torch.linspace(first, (first + size) * (count - 1) / count, count, device="cpu"))
    return [frames, *spatial]


def _sincos(positions: Tensor, width: int) -> Tensor:
    frequencies = BASE ** -(torch.arange(width // 2, dtype=torch.float64, device="cpu") / (width // 2))
    angle = torch.outer(positions, frequencies)
    return torch.cat((angle.sin(), angle.cos()), dim=-1).float()


def _spread(grid: Sequence[int], parts: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Lay tables, each over one dim of the grid, side by side for every cell: (S, sum of widths)."""
    wide = []
    for dim, table in parts:
        shape = [1, 1, 1, table.shape[-1]]
        shape[dim] = len(table)
        wide.append(table.view(shape).expand(*grid, -1))
    return torch.cat(wide, dim=-1).flatten(0, 2)
