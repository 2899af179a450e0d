"""Stateless randomness: every draw comes from a generator keyed by what it is for, so resuming is exact."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def keyed(seed: int, *key: object) -> torch.Generator:
    """Return a CPU generator that depends only on the seed and the key, such as ("noise", step, rank)."""
    import torch

    text = ":".join(map(str, (seed, *key)))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class Draws:
    """The randomness of one batch: each row has generators of its own.

    number: the batch since the start of the run; rows: the place of each row among those that all data ranks
    see together, so that sharing them among other numbers of ranks changes no draw; rank, world: of the data.
    """

    seed: int
    number: int
    rows: tuple[int, ...]
    rank: int = 0
    world: int = 1

    def of(self, what: str) -> list[torch.Generator]:
        """Return a generator for each row, keyed by what it is for."""
        return [keyed(self.seed, what, self.number, row) for row in self.rows]
