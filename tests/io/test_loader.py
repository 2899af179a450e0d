"""Batches are a function of seed and cursor: resumable, the same with workers, shared out without loss."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvx_core import Registry
from cvx_core.errors import FormatError
from cvx_core.interfaces import Batch, Row
from cvx_io.loader import Account, Cursor, Loader
from cvx_io.video import ClipTooShort, Item, Pick, read_row

START = Cursor()


def make_rows(count: int, captions: int = 1) -> list[Row]:
    return [Row(f"r{i}", tuple(f"r{i} caption {k}" for k in range(captions))) for i in range(count)]


def noise(row: Row, generator: torch.Generator) -> Item:
    """A video that shows which row and generator it was decoded with."""
    return Item(torch.rand(3, 1, 2, 2, generator=generator) + int(row.id[1:]))


def nothing(row: Row, generator: torch.Generator) -> Item:
    return Item()


def take(loader: Loader, count: int, cursor: Cursor = START) -> list[tuple[Cursor, Batch]]:
    return list(itertools.islice(loader.iterate(cursor), count))


def same(a: list[tuple[Cursor, Batch]], b: list[tuple[Cursor, Batch]]) -> bool:
    return len(a) == len(b) and all(
        x[0] == y[0] and x[1][:2] == y[1][:2] and torch.equal(x[1].video, y[1].video)
        for x, y in zip(a, b, strict=True)
    )


def ids(loader: Loader, epoch: int = 0) -> list[str]:
    batches = range(loader.account().batches)
    return [row.id for k in batches for row in loader.rows_at(Cursor(epoch, k))]


def test_resuming_anywhere_gives_exactly_the_rest() -> None:
    loader = Loader(make_rows(11, captions=3), noise, batch=2, seed=5)
    whole = take(loader, 12)
    cursors = [Cursor(), *(cursor for cursor, _ in whole)]
    assert cursors[5] == Cursor(1, 0), "the cursor after an epoch's last batch is the next epoch's first"
    for k in (1, 4, 5, 7):
        assert same(take(loader, 12 - k, cursors[k]), whole[k:])


def test_a_cursor_at_the_end_of_an_epoch_means_the_next() -> None:
    loader = Loader(make_rows(6), noise, batch=2)
    assert same(take(loader, 2, Cursor(0, 3)), take(loader, 2, Cursor(1, 0)))


@pytest.mark.parametrize("drop_last", [True, False])
def test_workers_change_nothing(drop_last: bool) -> None:
    settings_ = {"batch": 2, "seed": 3, "drop_last": drop_last}
    alone = take(Loader(make_rows(5, captions=2), noise, **settings_), 7, Cursor(0, 1))
    helped = take(Loader(make_rows(5, captions=2), noise, **settings_, workers=2), 7, Cursor(0, 1))
    assert same(alone, helped)
    cached = [replace(row, features=noise) for row in make_rows(5, captions=2)]
    read, ahead = (take(Loader(cached, noise, **settings_, workers=n), 7, Cursor(0, 1)) for n in (0, 2))
    assert same(read, ahead)


def test_rows_from_a_cache_are_read_in_this_process() -> None:
    def where(row: Row, generator: torch.Generator) -> Item:
        return Item(torch.full((3, 1, 2, 2), float(os.getpid())))

    rows = [replace(row, features=where) for row in make_rows(4)]
    loader = Loader(rows, where, batch=2, workers=2)
    found = [batch for _, batch in loader.iterate(epochs=20)]
    assert len(found) == 40
    assert {float(batch.video[0, 0, 0, 0, 0]) for batch in found} == {float(os.getpid())}
    list(itertools.islice(loader.iterate(), 3))  # what is not asked for any more ends with it


def test_the_loader_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(Loader(make_rows(5), noise, batch=2), 3)
    assert torch.equal(torch.rand(3), expected)


@given(
    count=st.integers(1, 60),
    batch=st.integers(1, 5),
    world=st.integers(1, 5),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_ranks_share_the_rows_out_as_the_account_says(
    count: int, batch: int, world: int, epoch: int, shuffle: bool, drop_last: bool
) -> None:
    rows = make_rows(count)

    def on_rank(rank: int) -> Loader:
        return Loader(rows, nothing, batch, rank=rank, world=world, shuffle=shuffle, drop_last=drop_last)

    try:
        ranks = [on_rank(rank) for rank in range(world)]
    except FormatError:
        assert drop_last
        assert count < batch * world
        return
    account = ranks[0].account()
    read = Counter(row for loader in ranks for row in ids(loader, epoch))
    assert account.rows == count == account.kept + account.dropped
    assert len(read) == account.kept
    assert read.total() == account.kept + account.repeated
    for cursor in (Cursor(epoch, k) for k in range(account.batches)):
        sizes = [len(loader.rows_at(cursor)) for loader in ranks]
        assert min(sizes) >= 1
        assert max(sizes) <= batch
        assert not drop_last or set(sizes) == {batch}


def test_a_step_has_the_same_rows_however_many_ranks_share_it() -> None:
    rows = make_rows(24)
    alone = Loader(rows, nothing, batch=6)
    ranks = [Loader(rows, nothing, batch=2, rank=rank, world=3) for rank in range(3)]
    for cursor in (Cursor(0, 0), Cursor(2, 3)):
        shared_out = {row.id for loader in ranks for row in loader.rows_at(cursor)}
        assert shared_out == {row.id for row in alone.rows_at(cursor)}


def test_shuffling_follows_seed_and_epoch() -> None:
    rows = make_rows(40)
    orders = [ids(Loader(rows, nothing, seed=seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == sorted(row.id for row in rows) for order in orders)
    assert ids(Loader(rows, nothing, shuffle=False), 3) == [row.id for row in rows]


def test_leftovers_are_counted_and_change_by_epoch() -> None:
    loader = Loader(make_rows(11), nothing, batch=2, world=2)
    assert loader.account() == Account(rows=11, batches=2, kept=8, dropped=3, repeated=0)
    assert set(ids(loader, 0)) != set(ids(loader, 1))
    assert Loader(make_rows(9), nothing, batch=2, world=4, drop_last=False).account() == Account(
        9, 2, 9, 0, 3
    )


def test_too_few_rows_are_an_error_with_numbers() -> None:
    with pytest.raises(FormatError, match=r"5 rows do not fill one batch of 2 on each of 3 ranks \(6 rows\)"):
        Loader(make_rows(5), nothing, batch=2, world=3)
    with pytest.raises(FormatError, match="0 rows"):
        Loader([], nothing, drop_last=False)


@pytest.mark.parametrize("cursor", [Cursor(0, 4), Cursor(-1, 0)])
def test_a_cursor_of_another_loader_is_an_error(cursor: Cursor) -> None:
    with pytest.raises(ValueError, match="another loader"):
        take(Loader(make_rows(6), nothing, batch=2), 1, cursor)


def test_fingerprint_changes_with_whatever_changes_the_order() -> None:
    rows = make_rows(6)
    base = Loader(rows, nothing, batch=2)
    others = [
        Loader(rows, nothing, batch=3),
        Loader(rows, nothing, batch=2, seed=1),
        Loader(rows, nothing, batch=2, shuffle=False),
        Loader(rows[::-1], nothing, batch=2),
    ]
    assert len({loader.fingerprint() for loader in (base, *others)}) == 5
    assert Loader(rows, noise, batch=2, workers=3).fingerprint() == base.fingerprint()
    assert Loader(rows, noise, batch=1, world=2, rank=1).fingerprint() == base.fingerprint()


def test_rows_before_a_cursor_are_those_of_all_ranks() -> None:
    rows = make_rows(6)
    ranks = [Loader(rows, nothing, batch=1, world=2, rank=rank) for rank in range(2)]
    batches = [[batch.rows[0] for _, batch in loader.iterate(epochs=2)] for loader in ranks]
    cursors = [cursor for cursor, _ in ranks[0].iterate(epochs=2)]
    assert [ranks[1].rows_before(cursor) for cursor in cursors] == list(zip(*batches, strict=True))


def test_captions_are_drawn_by_row_and_epoch() -> None:
    loader = Loader(make_rows(30, captions=3), nothing, batch=30)
    first, second = (batch.prompts for _, batch in take(loader, 2))
    assert {prompt[-1] for prompt in first} == {"0", "1", "2"}
    later = {prompt.split()[0]: prompt for prompt in second}
    assert any(later[prompt.split()[0]] != prompt for prompt in first), "another epoch draws anew"
    assert take(loader, 1)[0][1].prompts == first


def test_a_finite_pass_reads_every_row_once() -> None:
    loader = Loader(make_rows(5), nothing, batch=2, shuffle=False, drop_last=False)
    batches = [[row.id for row in batch.rows] for _, batch in loader.iterate(epochs=1)]
    assert batches == [["r0", "r1"], ["r2", "r3"], ["r4"]]


def short(row: Row, generator: torch.Generator) -> Item:
    raise ClipTooShort(f"row {row.id!r}: a.mp4 has 3 frames")


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_decoding_keep_type_and_text(workers: int) -> None:
    with pytest.raises(ClipTooShort) as error:
        take(Loader(make_rows(2), short, shuffle=False, workers=workers), 1)
    cached = [replace(row, features=short) for row in make_rows(2)]
    with pytest.raises(ClipTooShort):
        take(Loader(cached, short, shuffle=False, workers=workers), 1)
    assert str(error.value) == "row 'r0': a.mp4 has 3 frames"


def only_first_has_video(row: Row, generator: torch.Generator) -> Item:
    return Item(torch.zeros(3, 1, 2, 2) if row.id == "r0" else None)


def test_a_batch_is_with_or_without_video() -> None:
    assert take(Loader(make_rows(2), nothing, batch=2), 1)[0][1].video is None
    with pytest.raises(FormatError, match="row 'r1' has no video"):
        take(Loader(make_rows(2), only_first_has_video, batch=2, shuffle=False), 1)


def test_clips_arrive_decoded_in_workers(shared: Path) -> None:
    component = Registry.discover().get("reader", "auto")
    assert component.config is not None
    reader = component.load()(component.config(threads=1), None)
    rows = [Row(name, (name,), shared / "data/clips" / f"{name}.mp4") for name in ("hiker_tiny", "horse")]
    pick = Pick(5, 8, start="random")

    def decode(row: Row, generator: torch.Generator) -> Item:
        return read_row(row, reader, pick, 64, 96, generator)

    alone, helped = (take(Loader(rows, decode, batch=2, workers=workers), 2) for workers in (0, 2))
    assert same(alone, helped)
    batch = alone[0][1]
    assert batch.video is not None
    assert batch.image is not None
    assert (batch.video.shape, batch.image.shape) == ((2, 3, 5, 64, 96), (2, 3, 64, 96))
    assert torch.equal(batch.image, batch.video[:, :, 0])
    assert not torch.equal(batch.video[0], alone[1][1].video[batch.rows.index(rows[0])]), (
        "a new start each epoch"
    )
