"""Rows to batches: shuffled, sharded over data ranks, decoded by workers, and resumable to the batch.

Everything random is a function of (seed, epoch) and the row, never of what happened before. So the batches do
not depend on the number of workers, and a cursor is all the state there is. The rows of one step over all
ranks do not depend on how many ranks share them either, as long as batch * world stays the same.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cvx_core.errors import CvxError, FormatError
from cvx_core.interfaces import Batch, Row
from cvx_core.random import keyed
from cvx_io.video import Item

Decode = Callable[[Row, torch.Generator], Item]


@dataclass(frozen=True)
class Cursor:
    """The place before a batch: epoch, and index of the batch within it. Saved with the training state."""

    epoch: int = 0
    index: int = 0


@dataclass(frozen=True)
class Account:
    """What one epoch does with the rows, over all ranks. rows = kept + dropped; repeated ones come on top.

    batches: per rank; dropped: left over because they fill no batch on every rank; repeated: read twice so
    that every rank has as many batches.
    """

    rows: int
    batches: int
    kept: int
    dropped: int
    repeated: int


@dataclass(frozen=True)
class Loader:
    """Batches of one data rank.

    decode: (row, generator) -> Item, called in a worker; the generator is keyed by (seed, epoch, row id).
    batch: rows per batch on this rank; drop_last: leave out the rows that do not fill a batch on every rank
    (with shuffle, others in each epoch); otherwise the last batch is smaller. workers: processes that decode
    ahead, whole batches each; 0 decodes in this process.
    Raises FormatError where the rows do not fill a single batch.
    """

    rows: Sequence[Row]
    decode: Decode
    batch: int = 1
    seed: int = 0
    rank: int = 0
    world: int = 1
    shuffle: bool = True
    drop_last: bool = True
    workers: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or not 0 <= self.rank < self.world or self.workers < 0:
            raise ValueError(
                f"batch {self.batch}, rank {self.rank} of {self.world}, workers {self.workers} make no loader"
            )
        if self.account().batches == 0:
            raise FormatError(
                f"{len(self.rows)} rows do not fill one batch of {self.batch} on each of {self.world} ranks "
                f"({self.batch * self.world} rows). Add rows, lower loader.batch, or set loader.drop_last: "
                "false."
            )

    def account(self) -> Account:
        """Return what an epoch keeps, drops and repeats."""
        rows, step = len(self.rows), self.batch * self.world
        rest = rows % step
        if self.drop_last:
            return Account(rows, rows // step, kept=rows - rest, dropped=rest, repeated=0)
        repeated = max(self.world - rest, 0) if rest else 0
        return Account(rows, -(-rows // step), kept=rows, dropped=0, repeated=repeated)

    def fingerprint(self) -> str:
        """Return a digest of all that decides the order; a cursor is valid only where it is unchanged.

        How many ranks share the rows of a step is not part of it.
        """
        settings = (
            self.batch * self.world,
            self.seed,
            self.shuffle,
            self.drop_last,
            [row.id for row in self.rows],
        )
        return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]

    def iterate(self, cursor: Cursor = Cursor(), epochs: int | None = None) -> Iterator[tuple[Cursor, Batch]]:
        """Yield (the cursor after it, batch) from a cursor on, without end or for `epochs` epochs in all.

        Raises ValueError for a cursor outside the epoch, and what decode raises, with any number of workers.
        """
        batches = self.account().batches
        if cursor.epoch < 0 or not 0 <= cursor.index <= batches:
            raise ValueError(f"{cursor} is outside an epoch of {batches} batches; it is from another loader")
        places: DataLoader[Any] = DataLoader(
            _Batches(self),  # type: ignore[arg-type]  # a map from cursor to batch
            batch_size=None,
            sampler=_Places(cursor, batches, epochs),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else the global one would be drawn from
        )
        for place, result in places:
            if isinstance(result, CvxError):
                raise result
            yield _following(place, batches), result

    def rows_at(self, cursor: Cursor) -> tuple[Row, ...]:
        """Return the rows of the batch at a cursor, without decoding."""
        return self._shared(cursor)[self.rank :: self.world]

    def rows_before(self, cursor: Cursor) -> tuple[Row, ...]:
        """Return the rows, of all ranks, of the batches that end at a cursor."""
        if cursor.index > 0:
            return self._shared(Cursor(cursor.epoch, cursor.index - 1))
        return self._shared(Cursor(cursor.epoch - 1, self.account().batches - 1))

    def _shared(self, cursor: Cursor) -> tuple[Row, ...]:
        """Return the rows of all ranks at a cursor; rank r has those at r, r + world and so on."""
        order = self._order(cursor.epoch)
        step = self.batch * self.world
        picked = order[cursor.index * step : (cursor.index + 1) * step]
        picked += itertools.islice(itertools.cycle(order), max(self.world - len(picked), 0))
        return tuple(self.rows[i] for i in picked)

    def batch_at(self, cursor: Cursor) -> Batch:
        """Return the batch at a cursor."""
        rows = self.rows_at(cursor)
        items = [self.decode(row, keyed(self.seed, "pick", cursor.epoch, row.id)) for row in rows]
        prompts = tuple(self._prompt(row, cursor.epoch) for row in rows)
        return Batch(
            rows,
            prompts,
            _stack("video", rows, [item.video for item in items]),
            _stack("image", rows, [item.image for item in items]),
        )

    def _order(self, epoch: int) -> list[int]:
        count = len(self.rows)
        if not self.shuffle:
            return list(range(count))
        order: list[int] = torch.randperm(count, generator=keyed(self.seed, "order", epoch)).tolist()
        return order

    def _prompt(self, row: Row, epoch: int) -> str:
        if not row.captions:
            return ""
        generator = keyed(self.seed, "caption", epoch, row.id)
        return row.captions[int(torch.randint(len(row.captions), (), generator=generator))]


class _Batches:
    """The loader as a map from place to (place, batch), for workers.

    An error travels as a value, so that it is raised with its own type and text.
    """

    def __init__(self, loader: Loader):
        self.loader = loader

    def __getitem__(self, place: Cursor) -> tuple[Cursor, Batch | CvxError]:
        try:
            return place, self.loader.batch_at(place)
        except CvxError as error:
            error.__cause__ = None  # a library's own error may not survive the way to another process
            return place, error


@dataclass(frozen=True)
class _Places:
    """The cursors of the batches to come."""

    first: Cursor
    batches: int
    epochs: int | None

    def __iter__(self) -> Iterator[Cursor]:
        place = self.first if self.first.index < self.batches else Cursor(self.first.epoch + 1)
        while self.epochs is None or place.epoch < self.epochs:
            yield place
            place = _following(place, self.batches)


def _following(place: Cursor, batches: int) -> Cursor:
    return Cursor(place.epoch, place.index + 1) if place.index + 1 < batches else Cursor(place.epoch + 1)


def _as_it_is(batch: Any) -> Any:
    return batch


def _stack(what: str, rows: Sequence[Row], tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Return the tensors stacked, None where no row has one. Raises FormatError where only some have."""
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return None
    if len(present) < len(tensors):
        lacking = next(row.id for row, tensor in zip(rows, tensors, strict=True) if tensor is None)
        raise FormatError(
            f"row {lacking!r} has no {what}, others of its batch have. Give every row one, or none."
        )
    return torch.stack(present)
