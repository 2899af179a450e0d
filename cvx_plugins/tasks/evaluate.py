"""Measure a model on held-out rows: loss per timestep band, and the autoencoder's reconstruction."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
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


class Evaluate:
    """The `evaluate` task: writes evaluation.json and prints the same as a table."""

    def __init__(self, config: EvaluateConfig, deps: Deps):
        self._config = config

    def prepare(self, parts: Parts, spec: Spec) -> Parts:
        """Encode without pixel noise on images: the measure is of the clean condition."""
        return replace(parts, encoder=Encoder(parts, spec.card, image_noise=None))

    @torch.no_grad()
    def run(self, parts: Parts, spec: Spec) -> None:
        """Go once over the rows, in order; every row sees the same bands and noise on every call."""
        losses: list[list[float]] = [[] for _ in range(self._config.bands)]
        psnrs: list[float] = []
        batches = list(self._batches(parts, spec))
        with progress("evaluate", len(batches)) as bar:
            for number, batch in enumerate(batches):
                self._measure(batch, number, parts, spec, losses)
                psnrs += _psnr(batch, parts)
                bar.step()
        bands = [
            {"from": low, "to": high, "loss": sum(values) / len(values)}
            for (low, high), values in zip(self._bounds(), losses, strict=True)
        ]
        mean = sum(band["loss"] for band in bands) / len(bands)
        result = {
            "rows": len(psnrs),
            "loss": mean,
            "bands": bands,
            "psnr": sum(psnrs) / len(psnrs),
            "digest": spec.digest,
        }
        write_json(spec.output / "evaluation.json", result)
        write_json(spec.output / "weights.json", dict(parts.loaded))
        for band in bands:
            log.info("timesteps %4d..%4d  loss %.5f", band["from"], band["to"] - 1, band["loss"])
        log.info(
            "loss %.5f, reconstruction %.2f dB, %d rows: %s", mean, result["psnr"], len(psnrs), spec.output
        )

    def _batches(self, parts: Parts, spec: Spec) -> Iterator[Batch]:
        loader = make_loader(parts, spec, once=True, limit=self._config.rows)
        for _, batch in loader.iterate(epochs=1):
            yield batch

    def _bounds(self) -> list[tuple[int, int]]:
        edges = [TRAINING_STEPS * i // self._config.bands for i in range(self._config.bands + 1)]
        return list(pairwise(edges))

    def _measure(
        self, batch: Batch, number: int, parts: Parts, spec: Spec, losses: list[list[float]]
    ) -> None:
        places = tuple(range(len(batch.rows)))
        features = parts.encoder(batch, Draws(spec.run.seed, number, places))
        for band, (low, high) in enumerate(self._bounds()):
            for draw in range(self._config.draws):
                draws = Draws(
                    spec.run.seed, (number * self._config.bands + band) * self._config.draws + draw, places
                )
                drawn = [torch.randint(low, high, (1,), generator=g) for g in draws.of("evaluate")]
                losses[band] += prediction_loss(parts, features, draws, torch.cat(drawn)).tolist()


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
