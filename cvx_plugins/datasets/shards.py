"""Tar shards in the layout of webdataset: members that share a name up to the first dot make a row."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from cvx_core.errors import FormatError
from cvx_core.interfaces import Row
from cvx_io.members import Member, members
from cvx_plugins.datasets.config import WebdatasetConfig
from cvx_plugins.datasets.listing import Listing, captions_of


class Webdataset:
    """Rows of one shard or a folder of them. A row's video is the path of a member, `shard.tar/name.mp4`."""

    def __init__(self, cfg: WebdatasetConfig, deps: Any = None):
        self.cfg = cfg

    def rows(self) -> tuple[Row, ...]:
        """Return the rows, shard after shard. Raises FormatError with every clip without a caption."""
        path = self.cfg.path
        if path is None or not path.exists():
            raise FormatError(f"dataset.path: no shard or folder {path}. Name one.")
        shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        listing = Listing(path, path)
        for shard in shards:
            try:
                self._add_shard(listing, Path(shard.absolute()), members(shard))
            except FormatError as error:
                listing.problem(None, str(error).partition(": ")[2], shard)
        return listing.finish()

    def _add_shard(self, listing: Listing, shard: Path, found: dict[str, Member]) -> None:
        groups: dict[str, dict[str, str]] = {}
        for name in found:
            at = PurePosixPath(name)
            stem, dot, ending = at.name.partition(".")
            if stem:
                groups.setdefault(str(at.with_name(stem)), {})[f"{dot}{ending}".lower()] = name
        for number, (key, group) in enumerate(groups.items(), start=1):
            media = [name for suffix, name in group.items() if suffix in self.cfg.suffixes]
            place = f"{shard}/{key}"
            if len(media) != 1:
                listing.problem(
                    None, f"has {len(media)} media members among {sorted(group)}; one is needed.", place
                )
            elif self.cfg.caption_suffix not in group:
                listing.problem(None, f"has no {self.cfg.caption_suffix} among {sorted(group)}.", place)
            else:
                captions = self._captions(found[group[self.cfg.caption_suffix]])
                if isinstance(captions, str):
                    listing.problem(None, captions, f"{shard}/{group[self.cfg.caption_suffix]}")
                else:
                    listing.add(Row(f"{shard.name}/{key}", captions, shard / media[0]), number)

    def _captions(self, member: Member) -> tuple[str, ...] | str:
        """Return the captions of a member; text saying what is wrong where there are none."""
        with member.shard.open("rb") as file:
            file.seek(member.start)
            data = file.read(member.size)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return f"byte 0x{data[error.start]:02x} is not UTF-8. Write it anew."
        if self.cfg.caption_suffix != ".json":
            return captions_of(" ".join(text.split()))
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            return f"not valid JSON: {error.msg} at column {error.colno}."
        if not isinstance(record, dict) or self.cfg.caption_key not in record:
            return f"has no key {self.cfg.caption_key!r}."
        return captions_of(record[self.cfg.caption_key])
