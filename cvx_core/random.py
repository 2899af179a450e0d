"""Stateless randomness: every draw comes from a generator keyed by what it is for, so resuming is exact."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def keyed_seed(seed: int, *key: object) -> int:
    """Return a seed of 56 bits that depends only on the seed and the key, such as ("noise", step, rank)."""
    return _digested(":".join(map(str, (seed, *key))))


def keyed(seed: int, *key: object) -> torch.Generator:
    """Return a CPU generator of that seed."""
    import torch

    return torch.Generator().manual_seed(keyed_seed(seed, *key))


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

    def each(self, what: str) -> Iterator[torch.Generator]:
        """Yield the same one after the other; use each before the next, for it is one and the same object."""
        import torch

        generator = torch.Generator()
        for row in self.rows:
            yield generator.manual_seed(_digested(f"{self.seed}:{what}:{self.number}:{row}"))

    def normal(self, what: str, shape: Sequence[int]) -> torch.Tensor:
        """Return unit Gaussian noise (B, *shape) on the CPU, each row's from a generator of `of`."""
        return self._filled(what, shape, lambda row, generator: row.normal_(generator=generator))

    def uniform(self, what: str, shape: Sequence[int]) -> torch.Tensor:
        """Return numbers from 0 to 1, likewise."""
        return self._filled(what, shape, lambda row, generator: row.uniform_(generator=generator))

    def _filled(self, what: str, shape: Sequence[int], fill: Callable[..., Any]) -> torch.Tensor:
        """Fill the rows in place: there is nothing to be stacked."""
        import torch

        drawn = torch.empty((len(self.rows), *shape))
        for values, generator in zip(drawn.unbind(), self.each(what), strict=True):
            fill(values, generator)
        return drawn


def _digested(key: str) -> int:
    """Return 56 bits of a digest."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
