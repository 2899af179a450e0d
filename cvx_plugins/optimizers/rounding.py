"""Rounding to bfloat16 at random, from numbers that depend on nothing but a key."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_FACTORS = (-2048144789, -1028477387)  # those of MurmurHash3's last steps, as signed numbers


def stochastic(values: Tensor, *key: object) -> Tensor:
    """Return float32 values in bfloat16, rounded up or down at random so that the mean is kept.

    The same for the same key on any device. Values that are not finite stay so.
    """
    noise = _noise(values, *key)
    bits = values.contiguous().view(torch.int32)
    rounded = ((bits + noise) & -0x10000).view(torch.float32)
    return torch.where(rounded.isfinite() & values.isfinite(), rounded, values).to(torch.bfloat16)


def _noise(values: Tensor, *key: object) -> Tensor:
    """Return a number from 0 to 65535 for each value: a hash of its place and the key. Shape of values."""
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    start = int.from_bytes(digest[:4], "big", signed=True)
    step = int.from_bytes(digest[4:8], "big", signed=True) | 1  # odd: no two places get the same
    bits = torch.arange(values.numel(), dtype=torch.int32, device=values.device).mul_(step).add_(start)
    for shift, factor in zip((16, 13), _FACTORS, strict=True):
        bits = bits.bitwise_xor_((bits >> shift) & ((1 << (32 - shift)) - 1)).mul_(factor)
    return ((bits >> 16) & 0xFFFF).view(values.shape)
