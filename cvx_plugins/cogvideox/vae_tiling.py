"""How a clip is cut for coding: chunks of frames, and spatial tiles with blended overlaps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def chunked(frames: int, size: int) -> tuple[int, ...]:
    """Return chunk lengths: `size` each, the remainder in the first one."""
    count = max(frames // size, 1)
    return (frames - size * (count - 1), *[size] * (count - 1))


def whole(frames: int, lead: int, unit: int) -> tuple[int, ...]:  # noqa: ARG001
    """Return one chunk."""
    return (frames,)


def balanced(frames: int) -> tuple[int, ...]:
    """Return at most ten chunk lengths of two or more frames that differ by one at most, longer ones first.

    Source: CogVideo, sat/sample_video.py of the 1.5 release.
    """
    count = max(min(10, frames // 2), 1)
    return tuple(frames // count + (index < frames % count) for index in range(count))


def run_tiles(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    unit: tuple[int, int],
    size: tuple[int, int],
    overlap: tuple[int, int],
) -> Tensor:
    """Apply `run` to overlapping tiles of x (B,C,F,H,W) and blend the results linearly where they overlap.

    unit: pixels of x and of the output per latent pixel, (1, 8) when decoding; size, overlap: (rows, columns)
    of a tile in latent pixels. Only one row of overlaps is held beside the output.
    """
    source, target = unit
    height, width = (n // source for n in x.shape[3:])
    (tile_h, tile_w), (blend_h, blend_w) = size, overlap
    step_h, step_w = tile_h - blend_h, tile_w - blend_w
    out: Tensor | None = None
    above: list[Tensor] = []
    for top in range(0, height, step_h):
        below: list[Tensor] = []
        left: Tensor | None = None
        for column, start in enumerate(range(0, width, step_w)):
            rows = slice(top * source, (top + tile_h) * source)
            columns = slice(start * source, (start + tile_w) * source)
            tile = run(x[:, :, :, rows, columns])
            if above:
                tile = blend(above[column], tile, blend_h * target, dim=3)
            if left is not None:
                tile = blend(left, tile, blend_w * target, dim=4)
            below.append(_last(tile, blend_h * target, dim=3))
            left = _last(tile, blend_w * target, dim=4)
            if out is None:
                out = tile.new_empty(*tile.shape[:3], height * target, width * target)
            piece = tile[:, :, :, : step_h * target, : step_w * target]
            y, z = top * target, start * target
            out[:, :, :, y : y + piece.shape[3], z : z + piece.shape[4]] = piece
        above = below
    assert out is not None
    return out


def blend(before: Tensor, tile: Tensor, extent: int, dim: int) -> Tensor:
    """Return `tile` with its first `extent` places faded in from the last ones of `before`."""
    extent = min(extent, before.shape[dim], tile.shape[dim])
    if not extent:
        return tile
    ramp = torch.arange(extent, device=tile.device, dtype=torch.float32) / extent
    ramp = ramp.to(tile.dtype).view(-1, *[1] * (tile.ndim - 1 - dim))
    faded = torch.lerp(_last(before, extent, dim), tile.narrow(dim, 0, extent), ramp)
    return torch.cat([faded, tile.narrow(dim, extent, tile.shape[dim] - extent)], dim)


def _last(x: Tensor, count: int, dim: int) -> Tensor:
    count = min(count, x.shape[dim])
    return x.narrow(dim, x.shape[dim] - count, count).clone()
