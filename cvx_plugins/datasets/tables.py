"""Datasets kept in one index file: JSON lines and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cvx_core.errors import FormatError, did_you_mean
from cvx_core.interfaces import Row
from cvx_plugins.datasets.config import CsvConfig, JsonlConfig
from cvx_plugins.datasets.listing import Listing, captions_of, read_utf8, required


class Names(NamedTuple):
    """What the fields of a record are called."""

    video: str
    captions: str
    image: str
    id: str


class JsonLines:
    """Rows of a JSON-lines file; blank lines between records are allowed."""

    def __init__(self, cfg: JsonlConfig, deps: Any = None):
        self.cfg = cfg

    def rows(self) -> tuple[Row, ...]:
        """Return the rows in file order. Raises FormatError with every bad line and missing file."""
        cfg = self.cfg
        path = required(cfg.path, "path")
        names = Names(cfg.video_key, cfg.caption_key, cfg.image_key, cfg.id_key)
        listing = Listing(path, cfg.root)
        for line, text in enumerate(read_utf8(path).split("\n"), start=1):
            if text.strip():
                _add_json(listing, line, text, names)
        return listing.finish()


class CsvTable:
    """Rows of a CSV table with a header."""

    def __init__(self, cfg: CsvConfig, deps: Any = None):
        self.cfg = cfg

    def rows(self) -> tuple[Row, ...]:
        """Return the rows in file order. Raises FormatError with every bad line and missing file."""
        cfg = self.cfg
        path = required(cfg.path, "path")
        names = Names(cfg.video_column, cfg.caption_column, cfg.image_column, cfg.id_column)
        listing = Listing(path, cfg.root)
        table = csv.reader(io.StringIO(read_utf8(path), newline=""), delimiter=cfg.delimiter, strict=True)
        try:
            header = _header(next(table, []), names, path, cfg.delimiter)
            for values in table:
                _add_cells(listing, table.line_num, header, values, names)
        except csv.Error as error:
            raise FormatError(
                f"{path}:{table.line_num}: not valid CSV: {error}. Check its quotes."
            ) from error
        return listing.finish()


def _add_json(listing: Listing, line: int, text: str, names: Names) -> None:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        listing.problem(line, f"not valid JSON: {error.msg} at column {error.colno}.")
        return
    if isinstance(record, dict):
        _add(listing, line, record, names)
    else:
        listing.problem(line, f"expected a JSON object, got {type(record).__name__}.")


def _header(header: list[str], names: Names, path: Path, delimiter: str) -> list[str]:
    """Return the stripped column names. Raises FormatError where one is missing or occurs twice."""
    columns = [column.strip() for column in header]
    for name in (names.video, names.captions):
        if name not in columns:
            raise FormatError(
                f"{path}:1: no column {name!r} among {columns} (separated by {delimiter!r})."
                f"{did_you_mean(name, columns)} Name it by dataset.video_column or dataset.caption_column."
            )
    if len(set(columns)) < len(columns):
        raise FormatError(f"{path}:1: a column name occurs twice in {columns}. Rename one.")
    return columns


def _add_cells(listing: Listing, line: int, header: list[str], values: list[str], names: Names) -> None:
    if not values:
        return
    if len(values) != len(header):
        listing.problem(
            line, f"has {len(values)} cells, the header has {len(header)}. Quote cells with commas."
        )
        return
    record = dict(zip(header, values, strict=True))
    optional = (names.image, names.id)
    _add(listing, line, {k: v for k, v in record.items() if v or k not in optional}, names)


def _add(listing: Listing, line: int, record: Mapping[str, Any], names: Names) -> None:
    """Add the row of one record, or note everything wrong with it."""
    missing = [name for name in (names.video, names.captions) if name not in record]
    for name in missing:
        listing.problem(line, f"no key {name!r} among {list(record)}.{did_you_mean(name, record)}")
    if missing:
        return
    captions = captions_of(record[names.captions])
    if isinstance(captions, str):
        listing.problem(line, f"{names.captions}: {captions}")
    paths = {}
    for what, name in (("video", names.video), ("image", names.image)):
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            paths[what] = listing.media(value, line, what)
        elif what == "video" or name in record:
            listing.problem(line, f"{name}: expected a path, got {value!r}.")
    if isinstance(captions, str) or paths.get("video") is None:
        return
    given = record.get(names.id)
    row_id = str(given) if given is not None else f"{record[names.video].strip()}#{line}"
    meta = {key: value for key, value in record.items() if key not in names}
    listing.add(Row(row_id, captions, paths["video"], paths.get("image"), meta=meta), line)
