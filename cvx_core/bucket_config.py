"""Buckets as a recipe states them: resolutions, frame counts, and what becomes of clips offered to each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from cvx_core.errors import RecipeError

KeepProb = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Batch = Annotated[int, Field(ge=0)]
BucketTable = dict[str, dict[Count, tuple[KeepProb, Batch]]]
"""{"480p": {37: [keep_prob, batch]}}; batch is 0 only where keep_prob is, and nothing stays there."""

ASPECTS = ("9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9")
_LINES = re.compile(r"([1-9][0-9]*)p")
_SIDE = re.compile(r"[1-9][0-9]*")
_SIZE = re.compile(r"([1-9][0-9]*)x([1-9][0-9]*)")
_ASPECT = re.compile(r"([1-9][0-9]*):([1-9][0-9]*)")


class Resolution(NamedTuple):
    """area: pixels of a frame; size: (height, width) where the name states one, else None."""

    name: str
    area: float
    size: tuple[int, int] | None

    def sized(self, ratio: float, step: int) -> tuple[int, int]:
        """Return the height and width of a clip with a ratio width / height, in multiples of step."""
        if self.size is not None:
            return self.size
        height = math.sqrt(self.area / ratio)
        return max(round(height / step), 1) * step, max(round(height * ratio / step), 1) * step


def resolution(name: str) -> Resolution:
    """Return what a name such as "480p" (as many pixels as 16:9 has with 480 lines), "512" (as many as 512 x
    512) or "480x720" (height x width) stands for. Raises ValueError.
    """
    if match := _LINES.fullmatch(name):
        lines = int(match[1])
        return Resolution(name, lines * lines * 16 / 9, None)
    if _SIDE.fullmatch(name):
        return Resolution(name, int(name) ** 2, None)
    if match := _SIZE.fullmatch(name):
        height, width = int(match[1]), int(match[2])
        return Resolution(name, height * width, (height, width))
    raise ValueError(
        f"no resolution {name!r}; expected lines such as 480p, a side such as 512, or height x width such as "
        "480x720."
    )


def aspect(text: str) -> float:
    """Return width / height of "16:9". Raises ValueError."""
    match = _ASPECT.fullmatch(text)
    if match is None:
        raise ValueError(f"no aspect ratio {text!r}; expected width:height such as 16:9.")
    return int(match[1]) / int(match[2])


def ordered(table: Mapping[str, Mapping[int, Any]]) -> list[Resolution]:
    """Return the resolutions of a table, the largest first."""
    return sorted(map(resolution, table), key=lambda one: -one.area)


def geometries(
    table: Mapping[str, Mapping[int, Any]], aspects: Sequence[str], step: int
) -> Iterator[tuple[str, int, int, int]]:
    """Yield (where it is stated, frames, height, width) of everything that a table can give."""
    for one in ordered(table):
        ratios = [aspect(text) for text in aspects] if one.size is None else [1.0]
        for frames in table[one.name]:
            for size in dict.fromkeys(one.sized(ratio, step) for ratio in ratios):
                yield f"{one.name}.{frames}", frames, *size


def read_table(value: Any) -> Any:
    """Return a table as it is given, or read from the bucket file that is named; `bucket_config:` around it
    may be there.

    Raises ValueError with the file's problems.
    """
    return _typed(_file(value) if isinstance(value, str) else value)


def _typed(value: Any) -> Any:
    """Return a mapping with texts and numbers as keys and pairs as tuples, as far as it is one."""
    if not isinstance(value, Mapping):
        return value
    return {
        str(name) if type(name) is int else name: {
            int(frames) if str(frames).isdigit() else frames: tuple(pair) if isinstance(pair, list) else pair
            for frames, pair in counts.items()
        }
        if isinstance(counts, Mapping)
        else counts
        for name, counts in value.items()
    }


def _file(value: str) -> Any:
    from cvx_core.recipe import parse

    try:
        data = parse(Path(value).read_text(encoding="utf-8"), source=value).data
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{value}: cannot be read: {error}") from None
    except RecipeError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    return data["bucket_config"] if list(data) == ["bucket_config"] else data


def checked_table(table: BucketTable) -> BucketTable:
    """Return the table. Raises ValueError where a resolution is no such thing, or there is no bucket."""
    if not any(table.values()):
        raise ValueError("has no bucket. Give at least one, such as 480p: {49: [1.0, 2]}; null: no buckets.")
    for name, counts in table.items():
        resolution(name)
        for frames, (keep, batch) in counts.items():
            if batch == 0 and keep > 0:
                raise ValueError(
                    f"{name}.{frames}: keeps clips (keep_prob {keep:g}) in batches of 0. Give a batch, or "
                    "[0.0, 0], which passes every clip on to smaller resolutions."
                )
    if not any(batch for _, batch in _pairs(table)):
        raise ValueError("keeps no clip: every bucket is [0.0, 0]. Give one a keep_prob and a batch.")
    return table


def smallest_batch(table: BucketTable) -> int:
    """Return the smallest batch of the buckets that have one."""
    return min(batch for _, batch in _pairs(table) if batch)


def _pairs(table: BucketTable) -> list[tuple[float, int]]:
    return [pair for counts in table.values() for pair in counts.values()]
