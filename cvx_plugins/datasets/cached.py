"""The dataset `feature-cache`: rows that the precompute task has encoded. No torch until a row is read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cvx_core.errors import FormatError
from cvx_core.interfaces import Deps, Row
from cvx_io.cache.items import Encoded, Moments, Text, path_of, read_item
from cvx_io.cache.kept import Kept
from cvx_io.cache.rows import Listed, Shared, read_rows
from cvx_plugins.datasets.cached_config import FeatureCacheConfig

log = logging.getLogger("cvx")


@dataclass(frozen=True)
class Features:
    """Reads the items of one row. items: {kind: file}; texts: {caption: file}; kept: shared by all rows."""

    items: Mapping[str, Path]
    texts: Mapping[str, Path]
    kept: Kept = field(default_factory=Kept, compare=False, repr=False)

    def __call__(self, caption: str) -> Encoded:
        """Return moments and text. Raises FormatError where an item is missing or damaged."""
        moments = {kind: Moments(*self.kept.read(path, kind)) for kind, path in self.items.items()}
        text = Text(*self.kept.read(self.texts[caption], "text"))
        return Encoded(moments["latent"], moments.get("image_latent"), text)


class FeatureCache:
    """Rows of a cache. `shared` tells what they were made with."""

    def __init__(self, cfg: FeatureCacheConfig, deps: Deps | None = None):
        """Read the list. Raises FormatError where it is missing or damaged."""
        if cfg.path is None:
            raise FormatError("dataset.path is missing; name the output folder of a precompute run.")
        self.folder, self.name = cfg.path, cfg.rows
        self._spec = deps.spec if deps is not None else None
        found = read_rows(cfg.path, cfg.rows)
        self._kept = Kept()
        self.shared: Shared = found[0]
        self.listed: list[Listed] = found[1]

    def rows(self) -> tuple[Row, ...]:
        """Return the rows in the order of the dataset they were made from."""
        return tuple(self._row(listed) for listed in self.listed)

    @property
    def scale_factor(self) -> float:
        """What a latent is multiplied by: as the recipe says, else as when it was encoded."""
        if self._spec is None:
            return self.shared.scale_factor
        stated = getattr(self._spec.config("autoencoder"), "scale_factor", None)
        return float(stated or self._spec.card.latent_scale or self.shared.scale_factor)

    def unconditional(self) -> Text:
        """Return what stands for no prompt."""
        return Text(*read_item(path_of(self.folder, "text", self.shared.unconditional), "text"))

    def _row(self, listed: Listed) -> Row:
        items = {kind: path_of(self.folder, kind, key) for kind, key in listed.items.items()}
        captions = listed.captions or ("",)
        texts = {
            caption: path_of(self.folder, "text", key)
            for caption, key in zip(captions, listed.texts, strict=True)
        }
        meta = {"sources": dict(listed.sources)}
        return Row(listed.id, listed.captions, features=Features(items, texts, self._kept), meta=meta)
