"""Which bucket a clip goes to, or why it goes to none, from its size and length alone.

A clip is offered to one bucket of each resolution, from the largest resolution down: the longest that it
fills. It stays in the first that keeps it, and is passed over where none does.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import NamedTuple

from cvx_core.bucket_config import Resolution, aspect, ordered
from cvx_core.errors import FormatError
from cvx_core.interfaces import Row
from cvx_io.clips import Facts
from cvx_io.video import Pick, pick_frames

PASSED_OVER = "keep_prob"
LEFT_OVER = "left over"


class Shape(NamedTuple):
    """Geometry of every clip of a bucket, pixels."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Bucket:
    """Rows that make batches together. batch: rows per batch and rank; keep: the probability that a clip
    offered to it stays; shape: None where every row is decoded alike.
    """

    name: str
    batch: int
    keep: float = 1.0
    shape: Shape | None = None


@dataclass(frozen=True)
class Fate:
    """What becomes of a row in an epoch: the name of its bucket, or the kind of reason it is dropped for.

    detail: the reason in full.
    """

    row: str
    bucket: str | None
    reason: str | None = None
    detail: str = ""


class Offer(NamedTuple):
    """The buckets a row is offered to, in order; where there are none, the reason and its detail."""

    buckets: tuple[int, ...]
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Sorting:
    """Buckets, and what each row is offered to."""

    buckets: tuple[Bucket, ...]
    offers: tuple[Offer, ...]

    @classmethod
    def single(cls, rows: int, batch: int) -> Sorting:
        """Return that of a loader without buckets: all rows in one, each of them kept."""
        return cls((Bucket("all", batch),), (Offer((0,)),) * rows)

    def place(self, index: int, row_id: str, seed: int, epoch: int) -> int | None:
        """Return the bucket that keeps a row in an epoch, None where none does; nothing else decides it."""
        for number in self.offers[index].buckets:
            bucket = self.buckets[number]
            if bucket.keep >= 1 or _chance(seed, epoch, row_id, bucket.name) < bucket.keep:
                return number
        return None


def _chance(*key: object) -> float:
    """Return a number in [0,1) that depends on the key alone."""
    digest = hashlib.sha256(":".join(map(str, ("keep", *key))).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


class Rules(NamedTuple):
    """How clips are sorted.

    table: resolution -> frames -> (keep_prob, batch); aspects: see `aspect`, or "own"; step: what height and
    width are multiples of; enlarge: the most a clip may be enlarged, per side; pick: how frames are picked,
    whose own number of frames does not count.
    """

    table: Mapping[str, Mapping[int, tuple[float, int]]]
    aspects: Sequence[str]
    step: int
    enlarge: float
    pick: Pick


def sort_rows(facts: Sequence[Facts | FormatError], rules: Rules) -> Sorting:
    """Return what each row is offered to. facts: of every row; an error for those that cannot be read."""
    sorter = _Sorter(rules)
    offers = tuple(
        Offer((), "unreadable", str(fact)) if isinstance(fact, FormatError) else sorter.offer(fact)
        for fact in facts
    )
    return Sorting(tuple(sorter.buckets), offers)


class _Sorter:
    """Buckets come to be when the first clip needs them, in the order of the rows: the same on every rank."""

    def __init__(self, rules: Rules):
        self._rules = rules
        self._resolutions = ordered(rules.table)
        self._ratios = [] if rules.aspects == "own" else [aspect(text) for text in rules.aspects]
        self._numbers: dict[str, int] = {}
        self.buckets: list[Bucket] = []

    def offer(self, fact: Facts) -> Offer:
        sized = [(one, frames) for one in self._choices(fact) if (frames := self._length(one, fact))]
        if not sized:
            return self._no_length(fact)
        found, needed = [], []
        for one, frames in sized:
            height, width = self._size(one, fact)
            scale = max(height / fact.height, width / fact.width)
            needed.append((scale, f"{height}x{width}"))
            if fact.is_drawn or scale <= self._rules.enlarge:
                found.append(self._number(one, Shape(frames, height, width)))
        if not found:
            scale, size = min(needed)
            return Offer(
                (),
                "too small",
                f"{fact.height}x{fact.width} would be enlarged {scale:.2f} times for {size}; "
                f"loader.enlarge allows {self._rules.enlarge:g}",
            )
        return Offer(tuple(found))

    def _choices(self, fact: Facts) -> list[Resolution]:
        """Return the resolutions, the largest first; of sizes of one area only the nearest in aspect."""
        stated: dict[float, Resolution] = {}
        for one in self._resolutions:
            other = stated.get(one.area)
            if one.size is not None and (other is None or _away(one, fact) < _away(other, fact)):
                stated[one.area] = one
        return [one for one in self._resolutions if one.size is None or stated[one.area] is one]

    def _length(self, one: Resolution, fact: Facts) -> int | None:
        """Return the longest of a resolution's frame counts that a clip fills; only stills fill 1."""
        counts = sorted(self._rules.table[one.name], reverse=True)
        if fact.num_frames == 1:
            return 1 if 1 in counts else None
        counts = [count for count in counts if count > 1]
        for count in counts:
            if fact.is_drawn or self._fills(fact, count):
                return count
        return counts[-1] if counts and self._rules.pick.short == "repeat" else None

    def _fills(self, fact: Facts, frames: int) -> bool:
        """Whether frames can be picked; where no bucket is filled, `_no_length` says why."""
        pick = replace(self._rules.pick, frames=frames, short="error", start="first")
        try:
            pick_frames(fact.num_frames, fact.fps, pick, times=fact.times)
        except FormatError:
            return False
        return True

    def _no_length(self, fact: Facts) -> Offer:
        if fact.num_frames == 1:
            return Offer((), "still image", "no bucket has 1 frame")
        counts = {count for frames in self._rules.table.values() for count in frames if count > 1}
        if not counts:
            return Offer((), "video", "every bucket is of 1 frame")
        pick = replace(self._rules.pick, frames=min(counts), short="error", start="first")
        try:
            pick_frames(fact.num_frames, fact.fps, pick, times=fact.times)
        except FormatError as error:
            return Offer((), "too short", str(error))
        raise AssertionError("a clip that fills the shortest bucket has a length")

    def _size(self, one: Resolution, fact: Facts) -> tuple[int, int]:
        ratio = fact.width / fact.height
        if self._ratios:
            ratio = min(self._ratios, key=lambda other: abs(log(other / ratio)))
        return one.sized(ratio, self._rules.step)

    def _number(self, one: Resolution, shape: Shape) -> int:
        name = f"{one.name}/{shape.frames}x{shape.height}x{shape.width}"
        if name not in self._numbers:
            keep, batch = self._rules.table[one.name][shape.frames]
            self._numbers[name] = len(self.buckets)
            self.buckets.append(Bucket(name, batch, keep, shape))
        return self._numbers[name]


def _away(one: Resolution, fact: Facts) -> float:
    """Return how far the aspect of a stated size is from that of a clip."""
    assert one.size is not None
    return abs(log(one.size[1] / one.size[0] * fact.height / fact.width))


class Epoch(NamedTuple):
    """The batches of all ranks together, (bucket, rows) each, and the fate of every row."""

    batches: tuple[tuple[int, tuple[int, ...]], ...]
    fates: tuple[Fate, ...]


def lay_out(
    rows: Sequence[Row], sorting: Sorting, order: Sequence[int], seed: int, epoch: int, world: int, drop: bool
) -> Epoch:
    """Return an epoch: every bucket's rows cut into batches, bucket after bucket.

    order: of the rows; drop: whether rows that fill no batch on every rank are left out. Otherwise a bucket's
    last batch is smaller, with its rows repeated where there are fewer than ranks.
    """
    members: dict[int, list[int]] = {}
    fates: list[Fate | None] = [None] * len(rows)
    for index in order:
        number = sorting.place(index, rows[index].id, seed, epoch)
        if number is not None:
            members.setdefault(number, []).append(index)
        else:
            _, reason, detail = sorting.offers[index]
            fates[index] = Fate(rows[index].id, None, reason or PASSED_OVER, detail)
    batches: list[tuple[int, tuple[int, ...]]] = []
    for number in sorted(members):
        indices, bucket = members[number], sorting.buckets[number]
        step = bucket.batch * world
        whole = len(indices) // step * step if drop else len(indices)
        for first in range(0, whole, step):
            part = indices[first : first + step]
            part += [indices[i % len(indices)] for i in range(max(world - len(part), 0))]
            batches.append((number, tuple(part)))
        for index in indices[:whole]:
            fates[index] = Fate(rows[index].id, bucket.name)
        detail = f"{len(indices)} rows in {bucket.name}, batches of {step} over all ranks"
        for index in indices[whole:]:
            fates[index] = Fate(rows[index].id, None, LEFT_OVER, detail)
    return Epoch(tuple(batches), tuple(fate for fate in fates if fate is not None))


def check_drops(fates: Sequence[Fate], limit: float) -> None:
    """Raise FormatError where more than a share of the rows is dropped, those passed over aside."""
    dropped = [fate for fate in fates if fate.reason not in (None, PASSED_OVER)]
    if len(dropped) <= limit * len(fates):
        return
    raise FormatError(
        f"{len(dropped)} of {len(fates)} rows ({len(dropped) / len(fates):.0%}) are dropped, and "
        f"loader.max_drop allows {limit:.0%}:\n{reasons_text(dropped)}\n"
        "Change the clips, loader.buckets or loader.max_drop."
    )


def reasons_text(fates: Sequence[Fate]) -> str:
    """Return a line for every reason: how many rows, and the first of them."""
    kinds: dict[str, list[Fate]] = {}
    for fate in fates:
        if fate.reason is not None:
            kinds.setdefault(fate.reason, []).append(fate)
    return "\n".join(
        f"  {len(some)} {reason}: first {some[0].row!r}" + (f", {some[0].detail}" if some[0].detail else "")
        for reason, some in kinds.items()
    )


def counts(fates: Sequence[Fate]) -> dict[str, dict[str, int]]:
    """Return the number of rows by bucket, and by reason."""
    return {
        "buckets": dict(Counter(fate.bucket for fate in fates if fate.bucket is not None)),
        "reasons": dict(Counter(fate.reason for fate in fates if fate.reason is not None)),
    }
