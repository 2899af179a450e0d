"""Measure a model on held-out rows: loss per timestep band, and the autoencoder's reconstruction."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cvx_core.interfaces import Batch, Deps, Parts
from cvx_core.random import Draws
from cvx_core.spec import Spec
from cvx_io.atomic import write_json
from cvx_io.progress import progress
from cvx_plugins.tasks import EvaluateConfig
from cvx_plugins.tasks.encode import Encoder
from cvx_plugins.tasks.rows import make_loader
from cvx_plugins.tasks.train import prediction_loss

log = logging.getLogger("cvx")
TRAINING_STEPS = 1000


class Measured(NamedTuple):
    """Of one row: its place in the data, its loss in each band, and its reconstruction in dB."""

    place: int
    losses: tuple[float, ...]
    psnr: float


class Evaluate:
    """The `evaluate` task: writes evaluation.json and prints the same as a table."""

    def __init__(self, config: EvaluateConfig, deps: Deps):
        self._config = config

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
        with progress("evaluate", loader.account().batches) as bar:
            for number, (_, batch) in enumerate(loader.iterate(epochs=1)):
                start = number * loader.batch * loader.world + loader.rank
                places = tuple(start + i * loader.world for i in range(len(batch.rows)))
                mine += self._measure(batch, places, parts, spec)
                bar.step()
        # Rows past the end are repeated ones, so that every rank has as many batches.
        measured = [row for row in _of_all_ranks(mine, parts) if row.place < len(loader.rows)]
        if parts.mesh.is_first:
            self._write(measured, parts, spec)

    def _measure(self, batch: Batch, places: tuple[int, ...], parts: Parts, spec: Spec) -> list[Measured]:
        """Measure a batch. places: of its rows in the data; they key all that is drawn."""
        features = parts.encoder(batch, Draws(spec.run.seed, 0, places))
        by_band: list[list[float]] = []
        for band, (low, high) in enumerate(self._bounds()):
            total = torch.zeros(len(places))
            for draw in range(self._config.draws):
                draws = Draws(spec.run.seed, band * self._config.draws + draw, places)
                drawn = [torch.randint(low, high, (1,), generator=g) for g in draws.of("evaluate")]
                total += prediction_loss(parts, features, draws, torch.cat(drawn)).cpu()
            by_band.append((total / self._config.draws).tolist())
        losses = list(zip(*by_band, strict=True))
        psnrs = _psnr(batch, parts)
        return [Measured(*row) for row in zip(places, losses, psnrs, strict=True)]

    def _bounds(self) -> list[tuple[int, int]]:
        edges = [TRAINING_STEPS * i // self._config.bands for i in range(self._config.bands + 1)]
        return list(pairwise(edges))

    def _write(self, measured: Sequence[Measured], parts: Parts, spec: Spec) -> None:
        bands = [
            {"from": low, "to": high, "loss": fmean(row.losses[band] for row in measured)}
            for band, (low, high) in enumerate(self._bounds())
        ]
        result = {
            "rows": len(measured),
            "loss": fmean(band["loss"] for band in bands),
            "bands": bands,
            "psnr": fmean(row.psnr for row in measured),
            "digest": spec.digest,
        }
        write_json(spec.output / "evaluation.json", result)
        write_json(spec.output / "weights.json", dict(parts.loaded))
        for band in bands:
            log.info("timesteps %4d..%4d  loss %.5f", band["from"], band["to"] - 1, band["loss"])
        log.info(
            "loss %.5f, reconstruction %.2f dB, %d rows: %s",
            result["loss"],
            result["psnr"],
            len(measured),
            spec.output,
        )


def _of_all_ranks(mine: list[Measured], parts: Parts) -> list[Measured]:
    """Return what the ranks measured that read different rows, in the order of the data."""
    everyone: list[Any] = [mine]
    if (group := parts.mesh.group("batch")) is not None:
        everyone *= parts.mesh.size("batch")
        dist.all_gather_object(everyone, mine, group=group)
    return sorted(row for rank in everyone for row in rank)


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
