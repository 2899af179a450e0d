"""The loss per band of timesteps on rows that nobody trains on: shared by `evaluate` and validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from cvx_core.interfaces import Batch, Features, Parts
from cvx_core.random import Draws
from cvx_io.loader import Loader
from cvx_plugins.tasks.objective import prediction_loss

TRAINING_STEPS = 1000
T = TypeVar("T", bound=tuple[Any, ...])


class Placed(NamedTuple):
    """A batch, and the place of each of its rows in the data, which keys all that is drawn."""

    places: tuple[int, ...]
    batch: Batch


class Bands(NamedTuple):
    """Equal bands of timesteps, and the noise draws per row and band."""

    number: int
    draws: int

    def bounds(self) -> list[tuple[int, int]]:
        """Return the first timestep of each band, and the one behind its last."""
        edges = [TRAINING_STEPS * i // self.number for i in range(self.number + 1)]
        return list(pairwise(edges))

    @torch.no_grad()
    def losses(
        self, parts: Parts, features: Features, places: tuple[int, ...], seed: int
    ) -> list[tuple[float, ...]]:
        """Return the loss of each row in each band: the same timesteps and noise on every call."""
        by_band: list[list[float]] = []
        for band, (low, high) in enumerate(self.bounds()):
            total = torch.zeros(len(places))
            for draw in range(self.draws):
                draws = Draws(seed, band * self.draws + draw, places)
                drawn = [torch.randint(low, high, (1,), generator=g) for g in draws.of("evaluate")]
                total += prediction_loss(parts, features, draws, torch.cat(drawn)).cpu()
            by_band.append((total / self.draws).tolist())
        return list(zip(*by_band, strict=True))


def placed(loader: Loader) -> Iterator[Placed]:
    """Yield the batches of one pass over the rows. A row that is repeated, so that every rank has as many
    batches, has one place.
    """
    place = {row.id: number for number, row in enumerate(loader.rows)}
    for _, batch in loader.iterate(epochs=1):
        yield Placed(tuple(place[row.id] for row in batch.rows), batch)


def of_all_ranks(mine: list[T], parts: Parts) -> list[T]:
    """Return what the ranks measured that read different rows, in the order of the data, each row once.

    mine: tuples that begin with the row's place. Collective over `batch`.
    """
    everyone: list[Any] = [mine]
    if (group := parts.mesh.group("batch")) is not None:
        everyone *= parts.mesh.size("batch")
        dist.all_gather_object(everyone, mine, group=group)
    by_place = {row[0]: row for rank in everyone for row in rank}
    return [by_place[place] for place in sorted(by_place)]


def means(losses: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean loss of each band, for the losses of every row."""
    return [fmean(column) for column in zip(*losses, strict=True)]
