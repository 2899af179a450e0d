"""The loader of a task: the recipe's dataset, reader, geometry, buckets and batch put together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from cvx_core.errors import FormatError
from cvx_core.interfaces import Deps, Parts, Row
from cvx_core.spec import Spec
from cvx_io.atomic import write_json
from cvx_io.buckets import (
    LEFT_OVER,
    Bucket,
    Offer,
    Rules,
    Shape,
    Sorting,
    check_drops,
    counts,
    reasons_text,
    sort_rows,
)
from cvx_io.clips import Facts, probe
from cvx_io.loader import Loader
from cvx_io.progress import progress
from cvx_io.readable import Readable
from cvx_io.video import Item, Pick, pick_frames, read_row

log = logging.getLogger("cvx")
MAX_DROP = 0.1
"""Share of the rows that buckets may drop where the recipe says nothing."""


def make_loader(
    parts: Parts,
    spec: Spec,
    *,
    pixels: bool = True,
    once: bool = False,
    limit: int | None = None,
) -> Loader:
    """Return the loader of the recipe's rows; what becomes of each is logged, and written to data.json.

    pixels: whether rows are decoded; once: every row in order, none dropped but those that fit no bucket;
    limit: the first rows only. Raises FormatError for rows without a video, and where more rows are dropped
    than loader.max_drop allows. Collective where there are buckets and several ranks.
    """
    rows = list(parts.dataset.rows())[:limit]
    video, config = spec.video, spec.loader
    reader = spec.choices["reader"].build(Deps(spec)) if "reader" in spec.choices else None
    pick = Pick(video.frames, video.fps, video.rule, video.start, video.skip, video.short)
    sorting = None
    world = parts.mesh.degrees.world
    if config.buckets is None:
        _refuse_stills(rows)
        if config.unreadable == "skip":
            sorting = usable(decode_first(rows, reader, spec, world), config.batch, pick)
    else:
        is_skip = config.unreadable == "skip"
        facts = decode_first(rows, reader, spec, world) if is_skip else probe_all(rows, reader, world)
        sorting = sort_rows(facts, rules_of(spec, pick))
        if once:
            # Every clip once: in the first bucket that has batches at all.
            kept = tuple(replace(bucket, keep=float(bucket.batch > 0)) for bucket in sorting.buckets)
            sorting = Sorting(kept, sorting.offers)
    loader = Loader(
        rows,
        Decode(reader, pick, video.height, video.width) if pixels else no_pixels,
        config.batch,
        spec.run.seed,
        parts.mesh.place("batch"),
        parts.mesh.size("batch"),
        shuffle=config.shuffle and not once,
        drop_last=config.drop_last and not once,
        workers=config.workers,
        sorting=sorting,
    )
    _check_drops(loader, spec)
    _tell(loader)
    if not once and parts.mesh.is_first:
        write_json(spec.output / "data.json", account_of(loader))
    return loader


def _check_drops(loader: Loader, spec: Spec) -> None:
    """Raise FormatError where more rows are dropped than the recipe allows, or than is usual."""
    config, fates = spec.loader, loader.fates()
    if config.max_drop is not None:
        check_drops(fates, config.max_drop)
    elif config.buckets is not None:
        check_drops(fates, MAX_DROP)
    elif loader.sorting is not None:  # what fills no batch is nobody's fault
        check_drops([fate for fate in fates if fate.reason != LEFT_OVER], MAX_DROP)


def _refuse_stills(rows: Sequence[Row]) -> None:
    still = [row for row in rows if row.video is None and row.make is None and row.features is None]
    if still:
        raise FormatError(
            f"{len(still)} rows have no video, first {still[0].id!r}. Use a dataset of clips, or give "
            "loader.buckets with 1 frame."
        )


def rules_of(spec: Spec, pick: Pick) -> Rules:
    """Return how the recipe's buckets sort clips."""
    config = spec.loader
    assert config.buckets is not None
    return Rules(config.buckets, config.aspects, spec.card.size_step, config.enlarge, pick)


def usable(facts: Sequence[Facts | FormatError], batch: int, pick: Pick) -> Sorting | None:
    """Return one bucket for the clips that frames can be picked from, and why not from the others; None where
    all can.
    """
    offers = [_offer(fact, pick) for fact in facts]
    if all(offer.buckets for offer in offers):
        return None
    return Sorting((Bucket("all", batch),), tuple(offers))


def _offer(fact: Facts | FormatError, pick: Pick) -> Offer:
    if isinstance(fact, FormatError):
        return Offer((), "unreadable", str(fact))
    try:
        if not fact.is_drawn and (fact.num_frames, pick.frames) != (1, 1):
            pick_frames(fact.num_frames, fact.fps, replace(pick, start="first"), times=fact.times)
    except FormatError as error:
        return Offer((), "too short", str(error))
    return Offer((0,))


def decode_first(rows: Sequence[Row], reader: Any, spec: Spec, world: int = 1) -> list[Facts | FormatError]:
    """Return the facts of every row after decoding each frame, as probe_all does after a look; what is found
    is remembered in readable.json.
    """
    memory = Readable(spec.output / "readable.json")

    def look(mine: Sequence[Row]) -> Iterator[Facts | FormatError]:
        return memory.look(mine, reader, max(1, spec.loader.workers))

    found = _shared(rows, look, world, "decode clips")
    if world == 1 or dist.get_rank() == 0:
        memory.save(rows, found)
    return found


def probe_all(rows: Sequence[Row], reader: Any, world: int = 1) -> list[Facts | FormatError]:
    """Return the facts of every row, the same on every rank: each rank looks at some of the files.

    One that cannot be read is an error in its place. Collective over `world` ranks.
    """

    def look(mine: Sequence[Row]) -> Iterator[Facts | FormatError]:
        for row in mine:
            try:
                yield probe(row, reader)
            except FormatError as error:
                yield FormatError(str(error))  # its cause may not survive the way to other ranks

    return _shared(rows, look, world, "look at clips")


def _shared(
    rows: Sequence[Row],
    look: Callable[[Sequence[Row]], Iterator[Facts | FormatError]],
    world: int,
    what: str,
) -> list[Facts | FormatError]:
    """Return what looking at every row gives; each rank looks at some of them."""
    rank = dist.get_rank() if world > 1 else 0
    mine = rows[rank::world]
    found: list[Facts | FormatError] = []
    with progress(what, len(mine)) as bar:
        for one in look(mine):
            found.append(one)
            bar.step()
    everyone: list[Any] = [found]
    if world > 1:
        everyone *= world
        dist.all_gather_object(everyone, found)
    return [everyone[index % world][index // world] for index in range(len(rows))]


def _tell(loader: Loader) -> None:
    account, fates = loader.account(), loader.fates()
    of = f" of {loader.batch}" if loader.sorting is None else ""
    log.info("data: %d rows, %d batches%s an epoch", account.rows, account.batches, of)
    if loader.sorting is not None:
        for name, rows in counts(fates)["buckets"].items():
            log.info("  %d rows in %s", rows, name)
    if account.dropped:
        log.info("%d dropped:\n%s", account.dropped, reasons_text(fates))


def account_of(loader: Loader) -> dict[str, Any]:
    """Return what the first epoch does with the rows: sums, by bucket and reason, and for every row."""
    fates = loader.fates()
    return {**asdict(loader.account()), **counts(fates), "clips": [asdict(fate) for fate in fates]}


@dataclass(frozen=True)
class Decode:
    """Reads a row at the recipe's geometry, or that of its bucket; a value, which any worker can be given."""

    reader: Any
    pick: Pick
    height: int
    width: int

    def __call__(self, row: Row, generator: torch.Generator, shape: Shape | None = None) -> Item:
        if row.features is not None:
            return Item(encoded=row.features(row.captions[0]))
        pick, size = self.pick, (self.height, self.width)
        if shape is not None:
            pick, size = replace(pick, frames=shape.frames), (shape.height, shape.width)
        return read_row(row, self.reader, pick, *size, generator)


def no_pixels(_row: Row, _generator: torch.Generator, _shape: Shape | None = None) -> Item:
    """Read nothing: for rows whose features are in memory."""
    return Item()
