"""Looking after a feature cache: is it whole, what is in it, and what does no list of rows refer to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cvx_core.errors import FormatError
from cvx_io.atomic import is_left_over
from cvx_io.cache.items import KINDS, check_item, items_in
from cvx_io.cache.rows import Listed, Shared, files_of, names_in, read_rows


@dataclass
class Verified:
    """What a check found. damaged: {file: why}; missing: files that lists refer to, each with its list."""

    items: int = 0
    damaged: dict[Path, str] = field(default_factory=dict)
    missing: dict[Path, str] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        return not self.damaged and not self.missing


@dataclass(frozen=True)
class Stats:
    """Items and bytes by kind; rows by list; items and bytes that no list refers to."""

    items: dict[str, int]
    size: dict[str, int]
    rows: dict[str, int]
    unused: int
    unused_size: int


def verify(folder: Path) -> Iterator[Verified]:
    """Compare every item with its digest, then every list with the items; yields after each item.

    Raises FormatError where the folder is no cache.
    """
    lists, found = _lists(folder), Verified()
    for kind, path in items_in(folder):
        try:
            check_item(path, kind)
        except FormatError as error:
            found.damaged[path] = str(error)
        found.items += 1
        yield found
    for name, (shared, rows) in lists.items():
        for _, path in files_of(folder, shared, rows):
            if not path.is_file():
                found.missing[path] = name
    yield found


def stats(folder: Path) -> Stats:
    """Return what is in a cache. Raises FormatError where the folder is none."""
    lists = _lists(folder)
    used = _used(folder, lists)
    items: dict[str, int] = dict.fromkeys(KINDS, 0)
    size: dict[str, int] = dict.fromkeys(KINDS, 0)
    unused = unused_size = 0
    for kind, path in items_in(folder):
        length = path.stat().st_size
        items[kind] += 1
        size[kind] += length
        if path not in used:
            unused, unused_size = unused + 1, unused_size + length
    rows = {name: len(listed) for name, (_, listed) in lists.items()}
    return Stats(items, size, rows, unused, unused_size)


def unused(folder: Path) -> list[Path]:
    """Return the items that no list refers to, and what killed processes left of some.

    Raises FormatError where the folder is no cache, or a list cannot be read, for then all could be in use.
    """
    used = _used(folder, _lists(folder))
    return [path for _, path in items_in(folder) if path not in used] + _left(folder)


def _left(folder: Path) -> list[Path]:
    """Return files that were being written; no process still does so while none adds items."""
    found = [path for kind in (*KINDS, "rows") for path in (folder / kind).rglob(".*.partial")]
    return sorted(path for path in found if is_left_over(path))


def _lists(folder: Path) -> dict[str, tuple[Shared, list[Listed]]]:
    names = names_in(folder)
    if not names and not any((folder / kind).is_dir() for kind in KINDS):
        raise FormatError(f"{folder}: is no feature cache. Give the output folder of a precompute run.")
    return {name: read_rows(folder, name) for name in names}


def _used(folder: Path, lists: dict[str, tuple[Shared, list[Listed]]]) -> set[Path]:
    return {path for shared, rows in lists.values() for _, path in files_of(folder, shared, rows)}
