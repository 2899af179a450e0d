"""What a feature cache lacks of a recipe's rows, and why."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from cvx_core.card import Card
from cvx_core.errors import FormatError
from cvx_core.interfaces import Row
from cvx_core.mesh import Mesh
from cvx_core.spec import Spec
from cvx_io.cache.digests import Digests
from cvx_io.cache.items import KINDS, Ingredients, Kind, key_of, path_of
from cvx_io.cache.rows import Listed, Shared, ingredients_of, none_ingredients, read_rows
from cvx_io.progress import progress
from cvx_plugins.tasks.origins import differences, encoder_of, files_of, none_of, video_of

NAMES = {"latent": "latents", "image_latent": "image latents", "text": "texts"}
NOBODY = Row("(no prompt)")


class Wanted(NamedTuple):
    """An item to be made. row: the first that has it; caption: of a text, None for no prompt."""

    kind: Kind
    key: str
    ingredients: Ingredients
    row: Row
    caption: str | None
    why: str


def shared_by(spec: Spec, digests: Digests, scale: float) -> Shared:
    """Return what all rows of a recipe share. scale: what latents are multiplied by."""
    autoencoder = encoder_of(spec, "autoencoder", digests)
    text_encoder = encoder_of(spec, "text_encoder", digests)
    return Shared(video_of(spec), autoencoder, text_encoder, none_of(spec), scale, files_of(spec, digests))


class Worklist:
    """The rows of a recipe as lists of items, and the items that are missing.

    rows: of those that could be read; unread: {row: why not} of the others; missing: this rank's share first,
    then those of others, who may be slower.
    """

    def __init__(
        self,
        place: tuple[Path, str],
        shared: Shared,
        rows: Sequence[Row],
        digests: Digests,
        card: Card,
        mesh: Mesh,
    ):
        """Read every source file, or what is remembered of it. place: the cache, and the list's name."""
        self.folder, self.shared = place[0], shared
        self._digests, self._card = digests, card
        self._old, self._old_rows = _before(*place)
        self._all: dict[str, Wanted] = {}
        self.unread: dict[str, str] = {}
        self.rows: list[Listed] = []
        self._want("text", none_ingredients(shared), NOBODY, None)
        with progress("read sources", len(rows)) as bar:
            for row in rows:
                try:
                    self.rows.append(self._listed(row))
                except FormatError as error:
                    self.unread[row.id] = f"row {row.id!r}: {error}"
                bar.step()
        missing = [wanted for wanted in self._all.values() if not self.has(wanted)]
        self._counts = Counter((wanted.kind, wanted.why) for wanted in missing)
        rank, world = mesh.rank, mesh.degrees.world
        shares = [missing[(rank + other) % world :: world] for other in range(world)]
        self.missing: list[Wanted] = [wanted for share in shares for wanted in share]

    def has(self, wanted: Wanted) -> bool:
        """Tell whether an item has been made."""
        return path_of(self.folder, wanted.kind, wanted.key).is_file()

    def account(self) -> dict[str, Any]:
        """Return, by kind: how many items the rows have, how many were missing, and how many of them why."""
        total = Counter(wanted.kind for wanted in self._all.values())
        why: dict[str, dict[str, int]] = {kind: {} for kind in total}
        for (kind, reason), count in self._counts.items():
            why[kind][reason] = count
        encoded = {kind: sum(reasons.values()) for kind, reasons in why.items()}
        return {"items": dict(total), "encoded": encoded, "why": why}

    def report(self) -> Iterator[str]:
        """Yield a line for each kind of item."""
        account = self.account()
        for kind in (kind for kind in KINDS if kind in account["items"]):
            why = ", ".join(f"{reason} {count}" for reason, count in account["why"][kind].items())
            todo = f"{account['encoded'][kind]} to encode ({why})" if why else "none to encode"
            yield f"{NAMES[kind]}: {account['items'][kind]}, {todo}"

    def _listed(self, row: Row) -> Listed:
        """Return a row's items, those that nobody had before being wanted from now on."""
        digests = {"latent": self._digest_of_clip(row)}
        if self._card.image_latent != "none":
            digests["image_latent"] = self._digests.of(row.image) if row.image else digests["latent"]
        paths = {"video": row.video, "image": row.image if "image_latent" in digests else None}
        sources = {name: str(path) for name, path in paths.items() if path is not None}
        captions = row.captions or ("",)
        bare = Listed(row.id, row.captions, sources, {}, (), digests)
        kinds = [kind for kind in KINDS if kind in digests]
        items: dict[str, str] = {
            kind: self._want(kind, bare.ingredients(kind, self.shared), row, None) for kind in kinds
        }
        made = (ingredients_of("text", _digest(caption), self.shared) for caption in captions)
        texts = [self._want("text", of, row, caption) for of, caption in zip(made, captions, strict=True)]
        return replace(bare, items=items, texts=tuple(texts))

    def _digest_of_clip(self, row: Row) -> str:
        if row.video is not None:
            return self._digests.of(row.video)
        if row.make is None:
            raise FormatError("has no video. Use a dataset of clips.")
        size = (self.shared.video[name] for name in ("frames", "height", "width"))
        return hashlib.sha256(row.make(*size).tobytes()).hexdigest()

    def _want(self, kind: Kind, ingredients: Ingredients, row: Row, caption: str | None) -> str:
        key = key_of(ingredients)
        if key not in self._all:
            why = self._why(kind, ingredients, row, caption)
            self._all[key] = Wanted(kind, key, ingredients, row, caption, why)
        return key

    def _why(self, kind: Kind, ingredients: Ingredients, row: Row, caption: str | None) -> str:
        """Return what has changed since the list was last written; only then is the item missing."""
        listed = self._old_rows.get(row.id)
        if self._old is None or (listed is None and row is not NOBODY):
            return "new"
        if listed is None:
            before = none_ingredients(self._old)
        elif kind == "text":
            if caption not in (listed.captions or ("",)):
                return "caption changed"
            before = ingredients_of(kind, ingredients["source"], self._old)
        elif kind not in listed.digests:
            return "new"
        else:
            before = listed.ingredients(kind, self._old)
        changed = list(differences({**before, "source": ""}, {**ingredients, "source": ""}))
        if before["source"] != ingredients["source"]:
            is_still = kind == "image_latent" and row.image is not None
            changed.insert(0, f"{'image' if is_still else 'clip'} changed")
        return ", ".join(changed) or "its file is missing"


def _before(folder: Path, name: str) -> tuple[Shared | None, dict[str, Listed]]:
    """Return the list as it was last written; nothing where there is none that can be read."""
    try:
        shared, rows = read_rows(folder, name)
    except FormatError:
        return None, {}
    return shared, {row.id: row for row in rows}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
