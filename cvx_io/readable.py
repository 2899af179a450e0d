"""Which clips can be decoded to their end: found out once for each state of a file. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from cvx_core.errors import FormatError
from cvx_core.interfaces import Reader, Row
from cvx_io.atomic import write_json
from cvx_io.clips import Facts, of_row, probe, read_still
from cvx_io.decoding import Decoded, decode_all


class Readable:
    """What decoding every frame of a file gave, by path; a file counts as known while its size and time of
    change are what they were.
    """

    def __init__(self, memory: Path):
        self._memory = memory
        self._known: dict[str, Any] = {}
        with suppress(OSError, ValueError):  # a memory that cannot be read is made again
            self._known = dict(json.loads(memory.read_text(encoding="utf-8")))

    def look(self, rows: Sequence[Row], reader: Reader, jobs: int) -> Iterator[Facts | FormatError]:
        """Yield the facts of each row's clip, or why it, or its image, cannot be decoded; in order.

        jobs: processes that decode. One that dies or hangs costs the file that it was at.
        """
        new = {_key(row): row for row in rows if row.make is None and self._recall(row) is None}
        with closing(decode_all(list(new.values()), reader, jobs)) as decoded:
            for row in rows:
                if row.make is None and self._recall(row) is None:
                    self._keep(row, _facts(row, next(decoded)))
                yield self._of(row) if row.make is None else probe(row, reader)

    def save(self, rows: Sequence[Row], found: Sequence[Facts | FormatError]) -> None:
        """Write what is known, and what others have found of rows."""
        for row, fact in zip(rows, found, strict=True):
            if row.make is None and self._recall(row) is None:
                self._keep(row, fact)
        write_json(self._memory, self._known)

    def _keep(self, row: Row, found: Facts | FormatError) -> None:
        own = f"row {row.id!r}: "
        plain = str(found).removeprefix(own) if isinstance(found, FormatError) else list(found)
        self._known[_key(row)] = [_state(row), plain]

    def _recall(self, row: Row) -> Any:
        """Return what is known of a row's files as they are, None where that is nothing."""
        state, found = self._known.get(_key(row), (None, None))
        return found if state == _state(row) else None

    def _of(self, row: Row) -> Facts | FormatError:
        found = self._recall(row)
        if isinstance(found, str):
            path = row.video if row.video is not None else row.image
            assert path is not None
            return FormatError(str(of_row(row, path, FormatError(found))))
        facts = Facts(*found)
        return facts._replace(times=tuple(facts.times) if facts.times is not None else None)


def _facts(row: Row, result: Decoded | FormatError) -> Facts | FormatError:
    """Return what decoding a row gave, the row's image included."""
    if isinstance(result, FormatError):
        return result
    try:
        if row.image is not None and row.video is not None:
            read_still(row.image)
    except FormatError as error:
        return error
    return result.facts


def _key(row: Row) -> str:
    return " + ".join(str(path) for path in (row.video, row.image) if path is not None)


def _state(row: Row) -> list[list[int]]:
    """Return size and time of change of a row's files; a member of a shard has those of the shard."""
    return [_status(path) for path in (row.video, row.image) if path is not None]


def _status(path: Path) -> list[int]:
    for place in (path, *path.parents):
        if place.is_file():
            found = place.stat()
            return [found.st_size, found.st_mtime_ns]
    return []
