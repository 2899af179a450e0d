"""Measure a model on held-out rows: loss per timestep band, and the autoencoder's reconstruction."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from cvx_core.interfaces import Batch, Deps, Parts
from cvx_core.random import Draws
from cvx_core.spec import Spec
from cvx_io.atomic import write_json
from cvx_io.progress import progress
from cvx_plugins.tasks import EvaluateConfig
from cvx_plugins.tasks.encode import Encoder
from cvx_plugins.tasks.measure import Bands, means, of_all_ranks, placed
from cvx_plugins.tasks.record import recorded
from cvx_plugins.tasks.rows import make_loader

log = logging.getLogger("cvx")


class Measured(NamedTuple):
    """Of one row: its place in the data, its loss in each band, and its reconstruction in dB."""

    place: int
    losses: tuple[float, ...]
    psnr: float


class Evaluate:
    """The `evaluate` task: writes evaluation.json and prints the same as a table."""

    def __init__(self, config: EvaluateConfig, deps: Deps):
        self._config, self._bands = config, Bands(config.bands, config.draws)

    def prepare(self, parts: Parts, spec: Spec) -> Parts:
        """Encode without pixel noise on images: the measure is of the clean condition."""
        return replace(parts, encoder=Encoder(parts, spec.card, image_noise=None))

    @torch.no_grad()
    def run(self, parts: Parts, spec: Spec) -> None:
        """Go once over the rows, in order; every row sees the same bands and noise on every call, in batches
        of any size and on any number of ranks. The first rank writes.
        """
        loader = make_loader(parts, spec, once=True, limit=self._config.rows)
        mine: list[Measured] = []
        with recorded(parts, spec, "Ended, every row is measured"):
            with progress("evaluate", loader.account().batches) as bar:
                for places, batch in placed(loader):
                    mine += self._measure(batch, places, parts, spec)
                    bar.step()
            measured = of_all_ranks(mine, parts)
            if parts.mesh.is_first:
                self._write(measured, spec)

    def _measure(self, batch: Batch, places: tuple[int, ...], parts: Parts, spec: Spec) -> list[Measured]:
        features = parts.encoder(batch, Draws(spec.run.seed, 0, places))
        losses = self._bands.losses(parts, features, places, spec.run.seed)
        return [Measured(*row) for row in zip(places, losses, _psnr(batch, parts), strict=True)]

    def _write(self, measured: Sequence[Measured], spec: Spec) -> None:
        losses = means([row.losses for row in measured])
        bands = [
            {"from": low, "to": high, "loss": loss}
            for (low, high), loss in zip(self._bands.bounds(), losses, strict=True)
        ]
        result = {
            "rows": len(measured),
            "loss": fmean(losses),
            "bands": bands,
            "psnr": fmean(row.psnr for row in measured),
            "digest": spec.digest,
        }
        write_json(spec.output / "evaluation.json", result)
        for band in bands:
            log.info("timesteps %4d..%4d  loss %.5f", band["from"], band["to"] - 1, band["loss"])
        log.info(
            "loss %.5f, reconstruction %.2f dB, %d rows: %s",
            result["loss"],
            result["psnr"],
            len(measured),
            spec.output,
        )


def _psnr(batch: Batch, parts: Parts) -> list[float]:
    """Return the peak signal-to-noise ratio of each clip's reconstruction in dB, for pixels in [-1,1] (peak
    2).
    """
    weight = next(parts.autoencoder.parameters())
    assert batch.video is not None
    video = batch.video.to(weight.device, weight.dtype)
    reconstruction: Tensor = parts.autoencoder.decode(parts.autoencoder.encode(video)).clamp(-1, 1)
    errors = ((reconstruction - video).float() ** 2).flatten(1).mean(1)
    return [10 * math.log10(4 / max(error, 1e-12)) for error in errors.tolist()]
