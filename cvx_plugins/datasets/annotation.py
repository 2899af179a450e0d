"""A JSON file with records of clips at any depth: in lists, under names of folders or of anything else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cvx_core.errors import FormatError, did_you_mean
from cvx_core.interfaces import Row
from cvx_plugins.datasets.config import AnnotationConfig
from cvx_plugins.datasets.listing import Listing, captions_of, read_utf8, required


class Annotation:
    """Rows of such a file: mappings with the video's key are records; names above them have no meaning."""

    def __init__(self, cfg: AnnotationConfig, deps: Any = None):
        self.cfg = cfg

    def rows(self) -> tuple[Row, ...]:
        """Return the rows in file order. Raises FormatError with every bad record and missing file."""
        path = required(self.cfg.path, "path")
        try:
            data = json.loads(read_utf8(path))
        except json.JSONDecodeError as error:
            raise FormatError(
                f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}. Correct it."
            ) from error
        listing = Listing(path, self.cfg.root)
        for number, (place, record) in enumerate(self._records(data, ""), start=1):
            self._add(listing, number, place, record)
        return listing.finish()

    def _records(self, value: Any, place: str) -> Iterator[tuple[str, Any]]:
        """Yield (place, record); what is neither a record nor holds any is yielded too, to be refused."""
        if isinstance(value, dict) and value and self.cfg.video_key not in value:
            if any(isinstance(item, dict | list) for item in value.values()):
                for key, item in value.items():
                    if isinstance(item, dict | list):
                        yield from self._records(item, f"{place}.{key}" if place else str(key))
                return
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from self._records(item, f"{place}[{index}]")
            return
        yield place, value

    def _add(self, listing: Listing, number: int, place: str, record: Any) -> None:
        cfg, where = self.cfg, place or "the file"
        if not isinstance(record, dict):
            listing.problem(None, f"{where}: expected a record, got {type(record).__name__}.")
            return
        missing = [key for key in (cfg.video_key, cfg.caption_key) if key not in record]
        for key in missing:
            listing.problem(None, f"{where}: no key {key!r} among {list(record)}.{did_you_mean(key, record)}")
        if missing:
            return
        captions, name = captions_of(record[cfg.caption_key]), record[cfg.video_key]
        if isinstance(captions, str):
            listing.problem(None, f"{where}: {cfg.caption_key}: {captions}")
        if not isinstance(name, str) or not name.strip():
            listing.problem(None, f"{where}: {cfg.video_key}: expected a path, got {name!r}.")
            return
        video = listing.media(name, None, f"{where}: video")
        if video is not None and not isinstance(captions, str):
            meta = {
                key: value for key, value in record.items() if key not in (cfg.video_key, cfg.caption_key)
            }
            listing.add(Row(f"{name.strip()}#{number}", captions, video, meta=meta), number)
