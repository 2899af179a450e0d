"""Stateless randomness: every draw comes from a generator keyed by what it is for, so resuming is exact."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def keyed(seed: int, *key: object) -> torch.Generator:
    """Return a CPU generator that depends only on the seed and the key, such as ("noise", step, rank)."""
    import torch

    text = ":".join(map(str, (seed, *key)))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
