"""Lists of rows in a feature cache: which items each row has, and what they were made of. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cvx_core.errors import FormatError, did_you_mean
from cvx_io.atomic import write_text
from cvx_io.cache.items import KINDS, Ingredients, key_of, path_of

VERSION = 1
"""Of this layout."""
NOTHING = "nothing"
"""In place of a caption's digest, for what stands for no prompt."""


@dataclass(frozen=True)
class Shared:
    """What all rows of a list share.

    video: geometry and picking of frames; autoencoder, text_encoder: what is known of each encoder, under
    flat names; none: what else decides what stands for no prompt; scale_factor: what a latent is multiplied
    by; files: {path: digest} of the files that list the rows.
    """

    video: Mapping[str, Any]
    autoencoder: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    none: Mapping[str, Any]
    scale_factor: float
    files: Mapping[str, str] = field(default_factory=dict)
    version: int = VERSION

    @property
    def unconditional(self) -> str:
        """The key of the text item that stands for no prompt."""
        return key_of(none_ingredients(self))


@dataclass(frozen=True)
class Listed:
    """One row. sources: {"video" | "image": path}; items: {kind: key}; texts: a key for each caption.

    digests: {kind: digest of the source} of the items.
    """

    id: str
    captions: tuple[str, ...]
    sources: Mapping[str, str]
    items: Mapping[str, str]
    texts: tuple[str, ...]
    digests: Mapping[str, str]

    def ingredients(self, kind: str, shared: Shared) -> Ingredients:
        """Return what the row's item of a kind is made of."""
        is_still = kind == "image_latent" and "image" in self.sources
        return ingredients_of(kind, self.digests[kind], shared, is_still)


def write_rows(folder: Path, name: str, shared: Shared, rows: Sequence[Listed]) -> None:
    """Write a list of rows atomically, in place of an earlier one of that name."""
    lines = [json.dumps(part, ensure_ascii=False) for part in (asdict(shared), *map(asdict, rows))]
    write_text(_file(folder, name), "\n".join(lines) + "\n")


def read_rows(folder: Path, name: str) -> tuple[Shared, list[Listed]]:
    """Return a list of rows. Raises FormatError where there is none of that name, or it is damaged."""
    path = _file(folder, name)
    if not path.is_file():
        known = names_in(folder)
        have = f"It has: {', '.join(known)}." if known else "Run the precompute task to make one."
        raise FormatError(f"{folder}: no list of rows {name!r}.{did_you_mean(name, known)} {have}")
    try:
        first, *rest = path.read_text(encoding="utf-8").splitlines()
        shared = Shared(**json.loads(first))
        if shared.version != VERSION:
            raise FormatError(
                f"{path}: is of version {shared.version}; this code reads {VERSION}. Run precompute again."
            )
        return shared, [_listed(json.loads(line)) for line in rest]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{path}: is damaged: {error}. Run precompute again; items are kept.") from error


def names_in(folder: Path) -> list[str]:
    """Return the names of a cache's lists."""
    return sorted(path.stem for path in (folder / "rows").glob("[!.]*.jsonl"))


def files_of(folder: Path, shared: Shared, rows: Sequence[Listed]) -> Iterator[tuple[str, Path]]:
    """Yield the kind and file of every item that a list refers to, some more than once."""
    yield "text", path_of(folder, "text", shared.unconditional)
    for row in rows:
        for kind, key in row.items.items():
            yield kind, path_of(folder, kind, key)
        for key in row.texts:
            yield "text", path_of(folder, "text", key)


def ingredients_of(kind: str, source: str, shared: Shared, is_still: bool = False) -> Ingredients:
    """Return what an item is made of.

    source: digest of the clip, the image, or the caption; is_still: whether it is an image's, of which no
    frames are picked.
    """
    assert kind in KINDS
    encoder = shared.text_encoder if kind == "text" else shared.autoencoder
    names = () if kind == "text" else ("height", "width") if is_still else tuple(shared.video)
    return {"kind": kind, "source": source, **{f"video.{n}": shared.video[n] for n in names}, **encoder}


def none_ingredients(shared: Shared) -> Ingredients:
    """Return what the item is made of that stands for no prompt."""
    return {**ingredients_of("text", NOTHING, shared), **shared.none}


def _listed(data: Mapping[str, Any]) -> Listed:
    return Listed(**{**data, "captions": tuple(data["captions"]), "texts": tuple(data["texts"])})


def _file(folder: Path, name: str) -> Path:
    return folder / "rows" / f"{name}.jsonl"
