"""What every listing shares: UTF-8 lines, media paths, unique ids, and all problems reported at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cvx_core.errors import FormatError, ListingError
from cvx_core.interfaces import Row
from cvx_io.members import is_there

SHOWN = 20


class Listing:
    """Rows in the making, and what is wrong with them.

    source: the file that is listed; root: the folder that relative media paths start from.
    """

    def __init__(self, source: Path | str, root: Path | None = None):
        self.source = source
        self.root = Path(root) if root is not None else Path(source).parent
        self._rows: list[Row] = []
        self._places: dict[str, str] = {}
        self._problems: list[tuple[str, str]] = []

    def problem(self, line: int | None, message: str, source: Path | str | None = None) -> None:
        """Note a problem at a line of the source (or of another file)."""
        place = str(source or self.source)
        self._problems.append((f"{place}:{line}" if line is not None else place, message))

    def media(self, text: str, line: int | None, what: str, root: Path | None = None) -> Path | None:
        """Return the absolute path of a media file; a missing one is a problem."""
        path = Path(os.path.abspath((root or self.root) / text.strip()))  # noqa: PTH100 (keeps links as named)
        if not is_there(path):
            self.problem(line, f"{what} {str(path)!r} {_why_no_file(path)}.")
            return None
        return path

    def add(self, row: Row, line: int) -> None:
        """Keep a row; an id used before is a problem."""
        place = f"line {line}"
        if row.id in self._places:
            self.problem(line, f"id {row.id!r} is taken by {self._places[row.id]}; ids must be unique.")
            return
        self._places[row.id] = place
        self._rows.append(row)

    def finish(self) -> tuple[Row, ...]:
        """Return the rows. Raises ListingError with the first 20 problems and their number, or when empty."""
        if self._problems:
            count = len(self._problems)
            shown = "\n".join(f"{place}: {message}" for place, message in self._problems[:SHOWN])
            more = f"\n... and {count - SHOWN} more" if count > SHOWN else ""
            plural = "s" if count != 1 else ""
            raise ListingError(
                f"{shown}{more}\n{count} problem{plural} in {self.source}. Media paths are relative to "
                f"{self.root}; set the dataset's root where the files lie elsewhere.",
                self._rows,
                self._problems,
            )
        if not self._rows:
            raise FormatError(f"{self.source}: lists no rows. Add at least one, or name another file.")
        return tuple(self._rows)


def _why_no_file(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return "is a link that leads nowhere"
    if path.is_dir():
        return "is a folder, and a file is needed"
    return "is no regular file" if path.exists() else "does not exist"


def required(path: Path | None, field: str) -> Path:
    """Return a path the dataset cannot do without. Raises FormatError where it is missing or no file."""
    if path is None:
        raise FormatError(f"dataset.{field} is missing; name the file in the recipe.")
    if not path.is_file():
        raise FormatError(f"{path}: no such file. Correct dataset.{field}.")
    return path


def read_utf8(path: Path) -> str:
    """Return the text of a UTF-8 file without byte-order mark. Raises FormatError at the first other byte."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise FormatError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8. "
            f"Convert the file: iconv -f latin1 -t utf-8 '{path}' (with the encoding it really has)."
        ) from error


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file, stripped of blanks at both ends; the last line needs no newline.

    Only newlines end a line: prompts may hold other separators of Unicode.
    """
    text = read_utf8(path)
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.strip() for line in lines]


def captions_of(value: object) -> tuple[str, ...] | str:
    """Return the captions of a string or a list of strings; text saying what is wrong for anything else."""
    captions: Sequence[object] = (
        [value] if isinstance(value, str) else value if isinstance(value, list) else []
    )
    if not captions or not all(isinstance(caption, str) for caption in captions):
        return f"expected a caption or a list of captions, got {value!r}."
    if not all(str(caption).strip() for caption in captions):
        return "a caption is blank; write it, or drop the row."
    return tuple(str(caption) for caption in captions)
