"""Datasets that are a folder: clips with text files beside them, or with one metadata file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cvx_core.errors import FormatError
from cvx_core.interfaces import Row
from cvx_plugins.datasets.config import CsvConfig, FolderConfig, HfFolderConfig, JsonlConfig
from cvx_plugins.datasets.listing import Listing, read_utf8
from cvx_plugins.datasets.tables import CsvTable, JsonLines

METADATA = ("metadata.jsonl", "metadata.csv")


class Folder:
    """A row for every media file, named by its path within the folder."""

    def __init__(self, cfg: FolderConfig, deps: Any = None):
        self.cfg = cfg

    def rows(self) -> tuple[Row, ...]:
        """Return the rows by name. Raises FormatError with every clip without text, and text without clip."""
        root = _required(self.cfg.path)
        listing = Listing(root, root)
        texts = {file for file in root.rglob(f"*{self.cfg.caption_suffix}") if file.is_file()}
        used: dict[Path, Path] = {}
        for file in sorted(root.rglob("*")):
            if file.suffix.lower() not in self.cfg.suffixes or not file.is_file():
                continue
            name, text = file.relative_to(root).as_posix(), file.with_suffix(self.cfg.caption_suffix)
            if text not in texts:
                listing.problem(
                    None, f"has no text {text.name!r} beside it. Write it, or move the clip.", file
                )
            elif text in used:
                listing.problem(None, f"shares {text.name!r} with {used[text].name!r}. Rename one.", file)
            elif caption := _caption(listing, text):
                listing.add(Row(name, (caption,), Path(file.absolute())), len(used) + 1)
            used.setdefault(text, file)
        for text in sorted(texts - used.keys()):
            listing.problem(None, "has no clip of the same stem. Move it away.", text)
        return listing.finish()


def _caption(listing: Listing, text: Path) -> str:
    """Return the caption of a text file; "", and a problem, where there is none."""
    try:
        caption = " ".join(read_utf8(text).split())
    except FormatError as error:
        listing.problem(None, str(error).partition(": ")[2], text)
        return ""
    if not caption:
        listing.problem(None, "is blank; write the caption, or move the clip.", text)
    return caption


def _misplaced(root: Path, has_both: bool) -> str:
    """Return why a folder is not one of Hugging Face's, and what to do."""
    names = " and ".join(METADATA)
    if has_both:
        return f"has both of {names}. Keep one of them."
    below = sorted({file.parent.name for name in METADATA for file in root.glob(f"*/{name}")})
    hint = f"Set dataset.path to {root / below[0]}" if below else "Write one, with file_name and text"
    return f"has neither of {names}. {hint}."


class HfFolder:
    """Rows of the metadata file, whose records have `file_name`."""

    def __init__(self, cfg: HfFolderConfig, deps: Any = None):
        self.cfg = cfg

    def rows(self) -> tuple[Row, ...]:
        """Return the rows in file order. Raises FormatError with every bad record and missing file."""
        root, cfg = _required(self.cfg.path), self.cfg
        found = [root / name for name in METADATA if (root / name).is_file()]
        if len(found) != 1:
            raise FormatError(f"{root}: {_misplaced(root, bool(found))}")
        file, caption = cfg.file_key, cfg.caption_key
        if found[0].suffix == ".csv":
            return CsvTable(CsvConfig(path=found[0], video_column=file, caption_column=caption)).rows()
        return JsonLines(JsonlConfig(path=found[0], video_key=file, caption_key=caption)).rows()


def _required(path: Path | None) -> Path:
    if path is None:
        raise FormatError("dataset.path is missing; name the folder in the recipe.")
    if not path.is_dir():
        raise FormatError(f"{path}: no such folder. Correct dataset.path.")
    return path
