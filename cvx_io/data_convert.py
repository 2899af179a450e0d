"""Any listing of clips to data.jsonl: {"file", "captions", "id", ...} a line, for the dataset `jsonl`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cvx_core.errors import CvxError, FormatError, ListingError
from cvx_core.interfaces import Row
from cvx_core.registry import Registry
from cvx_io.atomic import atomic_file

Fields = dict[str, Any]
METADATA = ("metadata.jsonl", "metadata.csv")


def guess(sources: Sequence[Path]) -> tuple[str, Fields]:
    """Return the dataset, and its fields, that reads what is named. Raises CvxError where none is known to.

    Two text files are prompts and videos, in this order; a folder may hold prompt.txt and videos.txt.
    """
    if len(sources) == 2 and all(source.is_file() for source in sources):
        return "prompts-videos", {"prompts": sources[0], "videos": sources[1]}
    if len(sources) == 1:
        [source] = sources
        if source.is_dir():
            return _of_folder(source)
        kinds = {".jsonl": "jsonl", ".csv": "csv", ".json": "annotation", ".tar": "webdataset"}
        if source.is_file() and source.suffix in kinds:
            return kinds[source.suffix], {"path": source}
    names = ", ".join(map(str, sources))
    raise CvxError(
        f"{names}: no listing that is known. Give prompt.txt and videos.txt, a .jsonl, .csv, .json or .tar "
        "file, or a folder; or name the dataset by --from."
    )


def _of_folder(folder: Path) -> tuple[str, Fields]:
    for prompts in ("prompt.txt", "prompts.txt"):
        if (folder / prompts).is_file() and (folder / "videos.txt").is_file():
            return "prompts-videos", {"prompts": folder / prompts, "videos": folder / "videos.txt"}
    if any((folder / name).is_file() for name in METADATA):
        return "hf-folder", {"path": folder}
    if (folder / "annotation.json").is_file():
        return "annotation", {"path": folder / "annotation.json"}
    return ("webdataset" if any(folder.glob("*.tar")) else "folder"), {"path": folder}


def list_rows(kind: str, fields: Fields, skip_bad: bool = False) -> tuple[Sequence[Row], Sequence[str]]:
    """Return the rows of a dataset, and what is wrong with those that are left out.

    Raises FormatError where something is, unless skip_bad; CvxError for fields that the dataset has not.
    """
    component = Registry.discover().get("dataset", kind)
    assert component.config is not None
    if unknown := sorted(fields.keys() - component.config.model_fields.keys()):
        raise CvxError(f"dataset {kind!r} has no field {unknown[0]!r}.")
    dataset = component.load()(component.config(**{**component.preset, **fields}), None)
    try:
        return dataset.rows(), ()
    except ListingError as error:
        if not skip_bad:
            raise
        if not error.rows:
            raise FormatError(f"{error}\nNothing is left to write.") from error
        return error.rows, [f"{place}: {message}" for place, message in error.problems]


def write_jsonl(rows: Sequence[Row], path: Path) -> None:
    """Write rows, with media paths relative to the folder of the file.

    Raises FormatError for rows that no file can hold.
    """
    base = Path(os.path.abspath(path)).parent  # noqa: PTH100 (keeps links as named)
    lines = [json.dumps(_record(row, base), ensure_ascii=False) + "\n" for row in rows]
    with atomic_file(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8")


def _record(row: Row, base: Path) -> Fields:
    if row.video is None:
        raise FormatError(f"row {row.id!r} has no file of a clip, so data.jsonl cannot hold it. Drop it.")
    captions = row.captions[0] if len(row.captions) == 1 else list(row.captions)
    record: Fields = {"file": _relative(row.video, base), "captions": captions, "id": row.id}
    if row.image is not None:
        record["image"] = _relative(row.image, base)
    if taken := sorted(record.keys() & row.meta.keys()):
        raise FormatError(f"row {row.id!r}: its field {taken[0]!r} has a meaning in data.jsonl. Rename it.")
    return {**record, **row.meta}


def _relative(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)
