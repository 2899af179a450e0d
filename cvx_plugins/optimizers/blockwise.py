"""Values in 8 bits: one of 256 levels times the largest value of a block (Dettmers et al. 2021).

Blocks lie inside a row, so that sharing rows out among ranks changes no code and no scale.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

DECADES = 7


@lru_cache(None)
def levels(is_signed: bool, device: str = "cpu") -> Tensor:
    """Return the 256 levels up to 1, ascending: in each decade twice as many as in the one below."""
    found = [0.0, 1.0]
    for decade in range(DECADES):
        count = 2**decade if is_signed else 2 ** (decade + 1)
        positive = [10.0 ** (decade - 6) * (0.1 + 0.9 * (number + 0.5) / count) for number in range(count)]
        found += positive + ([-value for value in positive] if is_signed else [])
    return torch.tensor(sorted(found), device=device)


def quantise(values: Tensor, codes: Tensor, scale: Tensor, *, is_signed: bool, block: int) -> None:
    """Write values, of at least two dims, as codes, uint8 of that shape, and scale, (rows, blocks) float32.

    A value above zero gets a level above zero, for the root of a square may be divided by.
    """
    blocks = _in_blocks(values.float(), block)
    scale.copy_(blocks.abs().amax(-1))
    blocks = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    nearest = _nearest(blocks, is_signed)
    if not is_signed:
        nearest = nearest + ((nearest == 0) & (blocks > 0))
    length = prod(values.shape[1:])
    codes.copy_(nearest.flatten(1)[:, :length].reshape(values.shape))


def dequantised(codes: Tensor, scale: Tensor, *, is_signed: bool, block: int) -> Tensor:
    """Return float32 values in the shape of codes."""
    known = _looked_up(levels(is_signed, str(codes.device)), codes.int())
    blocks = _in_blocks(known, block) * scale.unsqueeze(-1)
    return blocks.flatten(1)[:, : prod(codes.shape[1:])].reshape(codes.shape)


def _nearest(values: Tensor, is_signed: bool) -> Tensor:
    """Return the number of the nearest level, int32. values: from -1 to 1, contiguous."""
    lowest, bounds = _cells(is_signed, str(values.device))
    found = _looked_up(lowest, (values.view(torch.int32) >> 16) & 0xFFFF)
    return found + (values > _looked_up(bounds, found))


def _looked_up(table: Tensor, places: Tensor) -> Tensor:
    return table.index_select(0, places.flatten()).view(places.shape)


@lru_cache(None)
def _cells(is_signed: bool, device: str) -> tuple[Tensor, Tensor]:
    """Return for each upper half of a float32's bits the lowest level that such a number is nearest to, and
    for each level the bound to the next.

    Numbers that share their upper half have at most one bound among them, so that one comparison decides:
    a small part of the time that a search among the bounds takes.
    """
    known = levels(is_signed)
    bounds = torch.cat([(known[1:] + known[:-1]) / 2, torch.tensor([torch.inf])])
    upper = torch.arange(65536, dtype=torch.int64) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).to(torch.int32).view(torch.float32)
    lowest = torch.bucketize(ends.amin(0), bounds[:-1], out_int32=True)
    return lowest.to(device), bounds.to(device)


def _in_blocks(values: Tensor, block: int) -> Tensor:
    """Return (rows, blocks, block), zeros at the end of each row."""
    length = prod(values.shape[1:])
    count = -(-length // block)
    rows = values.reshape(values.shape[0], length)
    return pad(rows, (0, count * block - length)).view(values.shape[0], count, block)
