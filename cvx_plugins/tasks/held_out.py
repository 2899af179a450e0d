"""The loss of held-out rows in a training run. They are encoded once, before the first step."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from cvx_core.errors import FormatError
from cvx_core.interfaces import Deps, Features, Parts, Row
from cvx_core.random import Draws
from cvx_core.spec import Spec
from cvx_io.progress import progress
from cvx_plugins.tasks.encode import Encoder
from cvx_plugins.tasks.measure import Bands, means, of_all_ranks, placed
from cvx_plugins.tasks.origins import differences
from cvx_plugins.tasks.rows import make_loader
from cvx_plugins.tasks.stale import check_cache
from cvx_plugins.tasks.validation_config import HeldOutConfig


class HeldOut:
    """Measures what `evaluate` would on the same rows, with the same draws each time."""

    def __init__(self, config: HeldOutConfig, parts: Parts, spec: Spec):
        """Read and encode the rows. Raises FormatError for rows that are trained on, or cannot be read."""
        self._parts, self._seed = parts, spec.run.seed
        self._bands = Bands(config.bands, config.draws)
        dataset = config.dataset.build(Deps(spec))
        check_cache(dataset, spec)
        _check_alike(dataset, parts.dataset)
        check_apart(dataset.rows()[: config.rows], parts.dataset.rows(), config.dataset.name)
        own = replace(parts, dataset=dataset)
        encoder = Encoder(own, spec.card, image_noise=None)
        encoder.moments_of, encoder.embeds_of = parts.encoder.moments_of, parts.encoder.embeds_of
        loader = make_loader(own, spec, once=True, limit=config.rows)
        self._ids = [row.id for row in loader.rows]
        self._held: list[tuple[tuple[int, ...], Features]] = []
        with progress("encode held-out rows", loader.account().batches) as bar:
            for places, batch in placed(loader):
                parts.mark("held-out rows")
                features = encoder(batch, Draws(self._seed, 0, places))
                self._held.append((places, _on(features, "cpu")))
                bar.step()

    def measure(self) -> tuple[dict[str, float], list[str]]:
        """Return the losses by name, and what is wrong with them. Collective; all ranks return the same.

        A loss that is not finite is left out.
        """
        mine: list[tuple[int, tuple[float, ...]]] = []
        for places, features in self._held:
            self._parts.mark("held-out loss")
            losses = self._bands.losses(self._parts, _on(features, self._parts.device), places, self._seed)
            mine += zip(places, losses, strict=True)
        measured = of_all_ranks(mine, self._parts)
        bad = [self._ids[place] for place, losses in measured if not all(map(math.isfinite, losses))]
        faults = [f"the held-out loss is not finite on {len(bad)} rows, first {bad[0]!r}"] if bad else []
        by_band = means([losses for _, losses in measured])
        named = {"validation/loss": fmean(by_band)}
        named |= {f"validation/loss_band_{band}": loss for band, loss in enumerate(by_band)}
        return {name: loss for name, loss in named.items() if math.isfinite(loss)}, faults


def check_apart(held_out: Sequence[Row], trained: Iterable[Row], name: str) -> None:
    """Raise FormatError where a clip is in both; clips are told apart by their files, not their contents."""
    own = {_clip(row): row.id for row in held_out}
    both = [(own[clip], row.id) for row in trained if (clip := _clip(row)) in own]
    if both:
        raise FormatError(
            f"task.validation.loss: {len(both)} of {len(own)} held-out clips are trained on too, such as row "
            f"{both[0][0]!r} of {name!r}, which is {both[0][1]!r} of the dataset. Take them "
            "out of one of the two."
        )


def _clip(row: Row) -> str:
    """Return what tells a row's clip from others."""
    path = row.video or dict(row.meta.get("sources", {})).get("video")
    if path is not None:
        return os.path.realpath(path)
    return repr(row.features if row.features is not None else row.make)


def _check_alike(held_out: Any, trained: Any) -> None:
    """Raise FormatError where two caches were not made alike."""
    ours, theirs = getattr(trained, "shared", None), getattr(held_out, "shared", None)
    if ours is None or theirs is None:
        return
    found = [
        text
        for name in ("video", "autoencoder", "text_encoder")
        for text in differences(getattr(ours, name), getattr(theirs, name))
    ]
    if found:
        raise FormatError(
            f"task.validation.loss: {held_out.folder} was not made as {trained.folder} was: {found[0]}"
            f"{f' and {len(found) - 1} more' if found[1:] else ''}. Precompute both with one recipe."
        )


def _on(features: Features, device: Any) -> Features:
    moved = (tensor.to(device) if isinstance(tensor, torch.Tensor) else None for tensor in features)
    return Features(*moved)  # type: ignore[arg-type]  # None stays only where it was
