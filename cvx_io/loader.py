"""Rows to batches: shuffled, sharded over data ranks, decoded by workers, and resumable to the batch.

Everything random is a function of (seed, epoch) and the row, never of what happened before. So the batches do
not depend on the number of workers, and a cursor is all the state there is. The rows of one step over all
ranks do not depend on how many ranks share them either, as long as batch * world stays the same.

Rows are sorted into buckets; without any, all are in one. A step is of one bucket on every rank.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cvx_core.errors import CvxError, FormatError
from cvx_core.interfaces import Batch, Row
from cvx_core.random import keyed
from cvx_io.buckets import Bucket, Epoch, Fate, Sorting, lay_out
from cvx_io.video import Item

Decode = Callable[..., Item]
AHEAD = 2
"""Batches that each worker thread may be ahead."""


@dataclass(frozen=True)
class Cursor:
    """The place before a batch: epoch, and index of the batch within it. Saved with the training state."""

    epoch: int = 0
    index: int = 0


@dataclass(frozen=True)
class Account:
    """What one epoch does with the rows, over all ranks. rows = kept + dropped; repeated ones come on top.

    batches: per rank; dropped: in no batch, `fates` says why; repeated: read twice so that every rank has as
    many batches.
    """

    rows: int
    batches: int
    kept: int
    dropped: int
    repeated: int


@dataclass(frozen=True)
class Loader:
    """Batches of one data rank.

    decode: (row, generator) -> Item, called in a worker; with buckets (row, generator, shape). The generator
    is keyed by (seed, epoch, row id). batch: rows per batch on this rank, where there are no buckets;
    drop_last: leave out the rows that do not fill a batch on every rank (with shuffle, others in each epoch);
    otherwise the last batch, of every bucket, is smaller. workers: processes that decode ahead, whole batches
    each, or threads where all rows come from a cache; 0 decodes in this process. sorting: the buckets, and
    which of them the rows are offered to.
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
    sorting: Sorting | None = None
    _epochs: dict[int, Epoch] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.batch < 1 or not 0 <= self.rank < self.world or self.workers < 0:
            raise ValueError(
                f"batch {self.batch}, rank {self.rank} of {self.world}, workers {self.workers} make no loader"
            )
        if self.sorting is not None and len(self.sorting.offers) != len(self.rows):
            raise ValueError(f"{len(self.sorting.offers)} rows are sorted, {len(self.rows)} are given")
        if not self.rows or self.batches(0) == 0:
            raise FormatError(self._too_few())

    def _too_few(self) -> str:
        rows, remedy = len(self.rows), "or set loader.drop_last: false."
        if self.sorting is None:
            return (
                f"{rows} rows do not fill one batch of {self.batch} on each of {self.world} ranks "
                f"({self.batch * self.world} rows). Add rows, lower loader.batch, {remedy}"
            )
        reasons = "; ".join(dict.fromkeys(f"{f.reason}: {f.detail}" for f in self.fates()[:3]))
        return (
            f"{rows} rows fill no batch of any bucket on each of {self.world} ranks ({reasons}). Change "
            f"loader.buckets or lower their batches, {remedy}"
        )

    def account(self, epoch: int = 0) -> Account:
        """Return what an epoch keeps, drops and repeats."""
        laid = self._epoch(epoch)
        kept = sum(fate.bucket is not None for fate in laid.fates)
        read = sum(len(rows) for _, rows in laid.batches)
        rows = len(self.rows)
        return Account(rows, len(laid.batches), kept=kept, dropped=rows - kept, repeated=read - kept)

    def fates(self, epoch: int = 0) -> tuple[Fate, ...]:
        """Return what becomes of every row in an epoch."""
        return self._epoch(epoch).fates

    def batches(self, epoch: int) -> int:
        """Return the number of batches of an epoch, on every rank; with keep_prob it differs by epoch."""
        return len(self._epoch(epoch).batches)

    def fingerprint(self) -> str:
        """Return a digest of all that decides the order; a cursor is valid only where it is unchanged.

        How many ranks share the rows of a step is not part of it.
        """
        settings: tuple[object, ...] = (
            self.batch * self.world,
            self.seed,
            self.shuffle,
            self.drop_last,
            [row.id for row in self.rows],
        )
        if self.sorting is not None:
            buckets = [(b.name, b.batch * self.world, b.keep) for b in self.sorting.buckets]
            settings = (*settings[1:], buckets, [offer.buckets for offer in self.sorting.offers])
        return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]

    def iterate(self, cursor: Cursor = Cursor(), epochs: int | None = None) -> Iterator[tuple[Cursor, Batch]]:
        """Yield (the cursor after it, batch) from a cursor on, without end or for `epochs` epochs in all.

        Raises ValueError for a cursor outside the epoch, and what decode raises, with any number of workers.
        """
        batches = self.batches(cursor.epoch) if cursor.epoch >= 0 else 0
        if not 0 <= cursor.index <= batches or cursor.epoch < 0:
            raise ValueError(f"{cursor} is outside an epoch of {batches} batches; it is from another loader")
        for place, result in self._results(_Places(self, cursor, epochs)):
            if isinstance(result, CvxError):
                raise result
            yield self.following(place), result

    def _results(self, places: _Places) -> Iterator[Any]:
        """Yield (place, batch or error), read ahead by threads or, where something is decoded, processes."""
        if not self.workers:
            return map(_Batches(self).__getitem__, places)
        if all(row.features is not None for row in self.rows):
            return _in_threads(_Batches(self), places, self.workers)
        found: DataLoader[Any] = DataLoader(
            _Batches(self),  # type: ignore[arg-type]  # a map from cursor to batch
            batch_size=None,
            sampler=places,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else the global one would be drawn from
        )
        return _of_living(found)

    def following(self, place: Cursor) -> Cursor:
        """Return the cursor after the batch at a cursor. An epoch without a batch is left out."""
        if place.index + 1 < self.batches(place.epoch):
            return Cursor(place.epoch, place.index + 1)
        epoch = place.epoch + 1
        while self.batches(epoch) == 0:
            epoch += 1
        return Cursor(epoch)

    def rows_at(self, cursor: Cursor) -> tuple[Row, ...]:
        """Return the rows of the batch at a cursor, without decoding."""
        return self._shared(cursor)[self.rank :: self.world]

    def rows_before(self, cursor: Cursor) -> tuple[Row, ...]:
        """Return the rows, of all ranks, of the batches that end at a cursor."""
        if cursor.index > 0:
            return self._shared(Cursor(cursor.epoch, cursor.index - 1))
        epoch = cursor.epoch - 1
        while self.batches(epoch) == 0:
            epoch -= 1
        return self._shared(Cursor(epoch, self.batches(epoch) - 1))

    def bucket_at(self, cursor: Cursor) -> Bucket:
        """Return the bucket of the batch at a cursor, the same on every rank."""
        number, _ = self._epoch(cursor.epoch).batches[cursor.index]
        return self._sorting.buckets[number]

    def _shared(self, cursor: Cursor) -> tuple[Row, ...]:
        """Return the rows of all ranks at a cursor; rank r has those at r, r + world and so on."""
        _, indices = self._epoch(cursor.epoch).batches[cursor.index]
        return tuple(self.rows[i] for i in indices)

    def batch_at(self, cursor: Cursor) -> Batch:
        """Return the batch at a cursor."""
        rows, shape = self.rows_at(cursor), self.bucket_at(cursor).shape
        more = (shape,) if shape is not None else ()
        prompts = tuple(self._prompt(row, cursor.epoch) for row in rows)
        chosen = map(_captioned, rows, prompts)
        items = [self.decode(row, keyed(self.seed, "pick", cursor.epoch, row.id), *more) for row in chosen]
        encoded = tuple(item.encoded for item in items if item.encoded is not None)
        return Batch(
            rows,
            prompts,
            _stack("video", rows, [item.video for item in items]),
            _stack("image", rows, [item.image for item in items]),
            encoded or None,
        )

    @property
    def _sorting(self) -> Sorting:
        return self.sorting if self.sorting is not None else Sorting.single(len(self.rows), self.batch)

    def _epoch(self, epoch: int) -> Epoch:
        """Return what an epoch holds; that of the last few is remembered."""
        if epoch not in self._epochs:
            order = self._order(epoch)
            laid = lay_out(self.rows, self._sorting, order, self.seed, epoch, self.world, self.drop_last)
            if len({number for number, _ in laid.batches}) > 1:  # else buckets would come one after another
                laid = laid._replace(batches=self._mixed(laid, order, epoch))
            for old in list(self._epochs)[:-1]:
                self._epochs.pop(old, None)  # another thread may have done it
            self._epochs[epoch] = laid
        return self._epochs[epoch]

    def _mixed(
        self, laid: Epoch, order: Sequence[int], epoch: int
    ) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Return the batches of several buckets as they are read: by chance, or by their first row."""
        if self.shuffle:
            generator = keyed(self.seed, "batches", epoch)
            places: list[int] = torch.randperm(len(laid.batches), generator=generator).tolist()
            return tuple(laid.batches[i] for i in places)
        place = {index: i for i, index in enumerate(order)}
        return tuple(sorted(laid.batches, key=lambda batch: place[batch[1][0]]))

    def _order(self, epoch: int) -> list[int]:
        count = len(self.rows)
        if not self.shuffle:
            return list(range(count))
        order: list[int] = torch.randperm(count, generator=keyed(self.seed, "order", epoch)).tolist()
        return order

    def _prompt(self, row: Row, epoch: int) -> str:
        if len(row.captions) < 2:
            return row.captions[0] if row.captions else ""
        generator = keyed(self.seed, "caption", epoch, row.id)
        return row.captions[int(torch.randint(len(row.captions), (), generator=generator))]


def _in_threads(batches: _Batches, places: Iterable[Cursor], workers: int) -> Iterator[Any]:
    """Yield batches in order, `AHEAD` per worker being read meanwhile.

    For rows from a cache: reading lets other threads run, and what a process reads would have to be handed
    on through shared memory, whose small pages cost several times the read.
    """
    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for place in places:
                waiting.append(pool.submit(batches.__getitem__, place))
                if len(waiting) > AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _of_living(places: Iterable[Any]) -> Iterator[Any]:
    """Yield the same. Raises CvxError where a worker dies: a decoder that crashes cannot say so itself."""
    try:
        yield from places
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise CvxError(
            f"a loader worker died: {str(error).splitlines()[0]} Memory ran out: lower loader.workers. Or a "
            "clip crashes the decoder: `cvx data inspect` finds it, loader.unreadable: skip leaves it out."
        ) from error


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

    loader: Loader
    first: Cursor
    epochs: int | None

    def __iter__(self) -> Iterator[Cursor]:
        place = self.first
        if place.index >= self.loader.batches(place.epoch):
            place = self.loader.following(place)
        while self.epochs is None or place.epoch < self.epochs:
            yield place
            place = self.loader.following(place)


def _as_it_is(batch: Any) -> Any:
    return batch


def _captioned(row: Row, prompt: str) -> Row:
    """Return a row with one caption."""
    return row if row.captions == (prompt,) else replace(row, captions=(prompt,))


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
