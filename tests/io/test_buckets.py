"""Laws of buckets over random clip lists: nothing is lost, chance is as stated, ranks agree, runs go on."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cvx_core import Registry
from cvx_core.errors import FormatError
from cvx_core.interfaces import Row
from cvx_io.buckets import PASSED_OVER, Bucket, Rules, Shape, check_drops, sort_rows
from cvx_io.clips import Facts, probe
from cvx_io.loader import Cursor, Loader
from cvx_io.video import Item, Pick

PICK = Pick(1, 8)
ASPECTS = ("9:16", "1:1", "16:9")
TABLE = {
    "480p": {37: (0.4, 2), 13: (1.0, 3)},
    "144p": {37: (0.7, 2), 13: (0.5, 4), 1: (0.6, 3)},
    "64x96": {5: (0.8, 1), 1: (1.0, 2)},
}


def rules(table: dict, **fields) -> Rules:
    return Rules(**{"table": table, "aspects": ASPECTS, "step": 16, "enlarge": 1.12, "pick": PICK} | fields)


def nothing(row: Row, generator: torch.Generator, shape: Shape | None = None) -> Item:
    return Item()


def random_facts(draw: random.Random, count: int) -> list[Facts | FormatError]:
    sizes = [(480, 854), (854, 480), (480, 720), (144, 256), (256, 256), (64, 96), (40, 50), (1080, 1920)]
    facts: list[Facts | FormatError] = []
    for _ in range(count):
        frames = draw.choice([1, 3, 5, 12, 13, 24, 36, 37, 49, 300])
        facts.append(Facts(frames, draw.choice([8, 24, 29.97]), *draw.choice(sizes)))
    if facts and draw.random() < 0.3:
        facts[draw.randrange(count)] = FormatError("x.mp4: truncated")
    return facts


def ids(loader: Loader, epoch: int) -> list[tuple[str, ...]]:
    return [tuple(r.id for r in loader.rows_at(Cursor(epoch, k))) for k in range(loader.batches(epoch))]


@pytest.mark.parametrize("lists", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_lists_keep_every_law(lists: int) -> None:
    """Every clip is accounted for, once; a step is of one bucket on all ranks; chance is what is stated; a
    run that is resumed reads what it would have read.
    """
    offered: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for number in range(lists):
        draw = random.Random(number)
        count, world, epoch = draw.randrange(1, 24), draw.choice([1, 2, 3]), draw.randrange(3)
        rows = [Row(f"{number}/{i}") for i in range(count)]
        sorting = sort_rows(random_facts(draw, count), rules(TABLE))
        settings = {
            "seed": draw.randrange(3),
            "world": world,
            "sorting": sorting,
            "shuffle": draw.random() < 0.8,
            "drop_last": draw.random() < 0.5,
        }
        try:
            ranks = [Loader(rows, nothing, rank=rank, **settings) for rank in range(world)]
        except FormatError:
            continue
        first = ranks[0]
        fates, account = first.fates(epoch), first.account(epoch)
        assert [fate.row for fate in fates] == [row.id for row in rows]
        assert all((fate.bucket is None) != (fate.reason is None) for fate in fates)
        assert account.rows == account.kept + account.dropped
        read = Counter(row for loader in ranks for batch in ids(loader, epoch) for row in batch)
        assert set(read) == {fate.row for fate in fates if fate.bucket is not None}
        assert read.total() == account.kept + account.repeated
        assert not (settings["drop_last"] and account.repeated)
        of = {fate.row: fate.bucket for fate in fates}
        for k in range(account.batches):
            cursor = Cursor(epoch, k)
            sizes = {len(loader.rows_at(cursor)) for loader in ranks}
            bucket = {loader.bucket_at(cursor) for loader in ranks}
            assert len(bucket) == 1, "all ranks have the same bucket at the same step"
            [one] = bucket
            assert {of[r.id] for loader in ranks for r in loader.rows_at(cursor)} == {one.name}
            assert sizes == {one.batch} if settings["drop_last"] else max(sizes) <= one.batch
        if account.batches and not number % 5:
            at = Cursor(epoch, draw.randrange(account.batches))
            again = Loader(rows, nothing, **settings)
            rest = [tuple(row.id for row in batch.rows) for _, batch in again.iterate(at, epochs=epoch + 1)]
            assert rest == ids(first, epoch)[at.index :], "a run that stops within an epoch goes on there"
        for index, offer in enumerate(sorting.offers):
            place = sorting.place(index, rows[index].id, settings["seed"], epoch)
            for bucket_number in offer.buckets:
                name = sorting.buckets[bucket_number].name
                offered[name] += 1
                kept[name] += place == bucket_number
                if place == bucket_number:
                    break
    assert len(offered) > 10
    for name, tries in offered.items():
        one, _, shape = name.partition("/")
        probability = TABLE[one][int(shape.split("x")[0])][0]
        bound = 5 * (probability * (1 - probability) * tries) ** 0.5 + 1e-9
        assert abs(kept[name] - probability * tries) <= bound, (name, kept[name], tries, probability)


def many(count: int = 400, **settings) -> Loader:
    facts = random_facts(random.Random(1), count)
    rows = [Row(f"r{i}", (f"r{i} a", f"r{i} b")) for i in range(count)]
    return Loader(rows, nothing, sorting=sort_rows(facts, rules(TABLE)), **settings)


def test_resuming_anywhere_goes_on_with_the_same_batches() -> None:
    loader = many(120, seed=3)
    whole = []
    for cursor, batch in loader.iterate(epochs=3):
        whole.append((cursor, batch[:2]))
    assert [loader.batches(epoch) for epoch in range(3)] != [loader.batches(0)] * 3, "epochs differ in length"
    for k in range(0, len(whole), 7):
        again = many(120, seed=3)
        assert [(c, b[:2]) for c, b in again.iterate(whole[k][0], epochs=3)] == whole[k + 1 :]
    for (cursor, batch), (_, before) in zip(whole[1:], whole, strict=False):
        assert {row.id for row in loader.rows_before(cursor)} == {row.id for row in batch[0]} != before


def test_a_step_has_the_same_rows_however_many_ranks_share_it() -> None:
    halved = {
        one: {frames: (keep, 2 * batch) for frames, (keep, batch) in counts.items()}
        for one, counts in TABLE.items()
    }
    facts = random_facts(random.Random(2), 200)
    rows = [Row(f"r{i}") for i in range(200)]
    ranks = [
        Loader(rows, nothing, rank=rank, world=2, sorting=sort_rows(facts, rules(TABLE))) for rank in range(2)
    ]
    alone = Loader(rows, nothing, sorting=sort_rows(facts, rules(halved)))
    assert alone.fingerprint() == ranks[1].fingerprint()
    for k in range(alone.batches(1)):
        shared_out = Counter(row.id for loader in ranks for row in loader.rows_at(Cursor(1, k)))
        assert shared_out == Counter(row.id for row in alone.rows_at(Cursor(1, k)))


def test_one_bucket_is_the_loader_without_buckets() -> None:
    rows = [Row(f"r{i}") for i in range(23)]
    sorting = sort_rows([Facts(49, 8, 480, 720)] * 23, rules({"480x720": {49: (1.0, 2)}}))
    for drop_last in (True, False):
        with_one = Loader(rows, nothing, sorting=sorting, seed=4, drop_last=drop_last)
        without = Loader(rows, nothing, batch=2, seed=4, drop_last=drop_last)
        assert [ids(with_one, epoch) for epoch in range(3)] == [ids(without, epoch) for epoch in range(3)]
        assert with_one.account(1) == without.account(1)


def test_buckets_are_mixed_within_an_epoch_and_in_order_without_shuffling() -> None:
    loader = many(seed=1)
    names = [loader.bucket_at(Cursor(0, k)).name for k in range(loader.batches(0))]
    changes = sum(a != b for a, b in pairwise(names))
    assert changes > len(set(names)) * 2
    place = {f"r{i}": i for i in range(400)}
    firsts = [place[batch[0]] for batch in ids(replace(loader, shuffle=False), 0)]
    assert firsts == sorted(firsts)


def test_what_is_kept_differs_by_epoch_and_the_fingerprint_by_clips() -> None:
    loader = many(seed=1)
    passed = [{f.row for f in loader.fates(epoch) if f.reason == PASSED_OVER} for epoch in (0, 1)]
    assert passed[0] != passed[1]
    shorter = list(random_facts(random.Random(1), 400))
    shorter[0] = Facts(5, 8, 64, 96)
    other = replace(loader, sorting=sort_rows(shorter, rules(TABLE)))
    assert other.fingerprint() != loader.fingerprint() == many(seed=1).fingerprint()


@pytest.mark.parametrize(
    ("fact", "bucket"),
    [
        (Facts(49, 8, 480, 854), "480p/37x480x848"),
        (Facts(49, 8, 854, 480), "480p/37x848x480"),
        (Facts(36, 8, 480, 854), "480p/13x480x848"),
        (Facts(49, 8, 200, 200), "144p/37x192x192"),
        (Facts(90, 29.97, 1080, 1920), "480p/13x480x848"),
        (Facts(1, 25, 1080, 1920), "144p/1x144x256"),
        (Facts(5, 8, 480, 854), "64x96/5x64x96"),
        (Facts(2, 8, 480, 854), "too short"),
        (Facts(49, 8, 40, 50), "too small"),
        (FormatError("x"), "unreadable"),
    ],
)
def test_a_clip_goes_to_the_largest_bucket_it_fills(fact: Facts | FormatError, bucket: str) -> None:
    sorting = sort_rows([fact], rules(TABLE))
    [offer] = sorting.offers
    assert (sorting.buckets[offer.buckets[0]].name if offer.buckets else offer.reason) == bucket


def test_a_bucket_without_batches_passes_every_clip_on() -> None:
    table = {"512": {5: (0.0, 0)}, "128": {5: (1.0, 2)}}
    sorting = sort_rows([Facts(9, 8, 600, 600)] * 4, rules(table))
    loader = Loader([Row(f"r{i}") for i in range(4)], nothing, sorting=sorting)
    assert {fate.bucket for epoch in range(3) for fate in loader.fates(epoch)} == {"128/5x128x128"}


def test_short_clips_repeat_their_last_frame_only_where_they_may() -> None:
    short, still = Facts(2, 8, 480, 854), Facts(1, 8, 480, 854)
    pick = Pick(1, 8, short="repeat")
    sorting = sort_rows([short, still], rules({"480p": {37: (1.0, 1), 13: (1.0, 1)}}, pick=pick))
    assert sorting.buckets[sorting.offers[0].buckets[0]].shape == Shape(13, 480, 848)
    assert sorting.offers[1].reason == "still image"
    [offer] = sort_rows([short], rules({"480p": {1: (1.0, 1)}})).offers
    assert offer.reason == "video"


def test_clips_keep_their_own_aspect_where_asked() -> None:
    facts = [Facts(49, 8, 480, 1200), Facts(49, 8, 700, 490)]
    sorting = sort_rows(facts, rules({"240p": {9: (1.0, 1)}}, aspects="own"))
    assert [b.shape[1:] for b in sorting.buckets if b.shape] == [(208, 512), (384, 272)]


def test_of_sizes_with_one_area_the_nearest_in_aspect_is_offered() -> None:
    table = {"64x96": {5: (1.0, 1)}, "96x64": {5: (1.0, 1)}}
    sorting = sort_rows([Facts(9, 8, 960, 700), Facts(9, 8, 700, 960)], rules(table))
    assert [[sorting.buckets[i].name for i in offer.buckets] for offer in sorting.offers] == [
        ["96x64/5x96x64"],
        ["64x96/5x64x96"],
    ]


def test_a_drop_rate_over_the_limit_is_an_error_that_says_why() -> None:
    facts: list[Facts | FormatError] = [Facts(49, 8, 480, 854)] * 8
    facts += [Facts(2, 8, 480, 854), FormatError("x.mp4: truncated")]
    rows = [Row(f"r{i}") for i in range(10)]
    fates = Loader(rows, nothing, sorting=sort_rows(facts, rules({"480p": {37: (0.5, 1)}}))).fates()
    check_drops(fates, 0.2)
    with pytest.raises(FormatError, match=r"2 of 10 rows \(20%\) are dropped, .* allows 19%") as error:
        check_drops(fates, 0.19)
    assert "1 too short: first 'r8', has 2 frames at 8 fps" in str(error.value)
    assert "1 unreadable: first 'r9', x.mp4: truncated" in str(error.value)


def test_rows_that_fill_no_batch_of_any_bucket_are_an_error() -> None:
    sorting = sort_rows([Facts(49, 8, 480, 854)] * 3, rules({"480p": {37: (1.0, 4)}}))
    with pytest.raises(FormatError, match="3 rows in 480p/37x480x848, batches of 4 over all ranks"):
        Loader([Row(f"r{i}") for i in range(3)], nothing, sorting=sorting)
    with pytest.raises(ValueError, match="3 rows are sorted, 2 are given"):
        Loader([Row("a"), Row("b")], nothing, sorting=sorting)


def test_shapes_reach_the_decoder() -> None:
    def decode(row: Row, generator: torch.Generator, shape: Shape) -> Item:
        return Item(torch.zeros(3, *shape))

    for _, batch in replace(many(60), decode=decode).iterate(epochs=1):
        assert batch.video is not None
    assert Bucket("b", 1).shape is None


def test_the_real_clips_land_in_the_right_buckets(shared: Path) -> None:
    """480x720 at 8 fps, 49 frames; 240x368 likewise; 720x1280 at 30 fps, 453 frames (120 at 8 fps)."""
    component = Registry.discover().get("reader", "auto")
    assert component.config is not None
    reader = component.load()(component.config(threads=1), None)
    clips = sorted((shared / "data/clips").iterdir())
    facts = [probe(Row(path.name, video=path), reader) for path in clips]
    table = {"720p": {97: (1.0, 1)}, "480p": {49: (1.0, 1)}, "240p": {49: (1.0, 1), 9: (1.0, 2)}}
    aspects = ("2:3", "9:16", "1:1", "16:9", "3:2")
    sorting = sort_rows(facts, rules(table, aspects=aspects))
    landed = {
        path.name: [sorting.buckets[i].name for i in offer.buckets]
        for path, offer in zip(clips, sorting.offers, strict=True)
    }
    wide, narrow = "480p/49x528x784", "240p/49x256x384"
    assert landed == {
        "gallery.webm": ["720p/97x720x1280", "480p/49x480x848", "240p/49x240x432"],
        "hiker.mp4": [wide, narrow],
        "hiker_tiny.mp4": [narrow],
        "horse.mp4": [wide, narrow],
        "train_running.mp4": [wide, narrow],
    }
