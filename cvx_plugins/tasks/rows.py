"""The loader of a task: the recipe's dataset, reader, geometry and batch put together."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from cvx_core.errors import FormatError
from cvx_core.interfaces import Deps, Parts, Row
from cvx_core.spec import Spec
from cvx_io.loader import Loader
from cvx_io.video import Item, Pick, read_row

log = logging.getLogger("cvx")


def make_loader(
    parts: Parts,
    spec: Spec,
    *,
    pixels: bool = True,
    once: bool = False,
    limit: int | None = None,
) -> Loader:
    """Return the loader of the recipe's rows.

    pixels: whether rows are decoded; once: every row in order, none dropped; limit: the first rows only.
    Raises FormatError for rows without a video.
    """
    rows = list(parts.dataset.rows())[:limit]
    still = [row for row in rows if row.video is None and row.make is None]
    if still:
        raise FormatError(f"{len(still)} rows have no video, first {still[0].id!r}. Use a dataset of clips.")
    video, config = spec.video, spec.loader
    reader = spec.choices["reader"].build(Deps(spec))
    pick = Pick(video.frames, video.fps, video.rule, video.start, video.skip, video.short)

    loader = Loader(
        rows,
        Decode(reader, pick, video.height, video.width) if pixels else no_pixels,
        config.batch,
        spec.run.seed,
        parts.mesh.place("batch"),
        parts.mesh.size("batch"),
        shuffle=config.shuffle and not once,
        drop_last=config.drop_last and not once,
        workers=config.workers,
    )
    account = loader.account()
    dropped = f", {account.dropped} dropped because they fill no batch" if account.dropped else ""
    log.info(
        "data: %d rows, %d batches of %d an epoch%s", account.rows, account.batches, config.batch, dropped
    )
    return loader


@dataclass(frozen=True)
class Decode:
    """Reads a row at the recipe's geometry; a value, so that workers of any kind can be given it."""

    reader: Any
    pick: Pick
    height: int
    width: int

    def __call__(self, row: Row, generator: torch.Generator) -> Item:
        return read_row(row, self.reader, self.pick, self.height, self.width, generator)


def no_pixels(_row: Row, _generator: torch.Generator) -> Item:
    """Read nothing: for rows whose features are in memory."""
    return Item()
