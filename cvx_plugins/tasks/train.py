"""Train a predictor: draw a timestep and noise, predict the target, mean squared error in float32."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from cvx_core.interfaces import Deps, Features, Parts, Work
from cvx_core.random import Draws
from cvx_core.spec import Spec
from cvx_io.progress import progress
from cvx_plugins.tasks import TrainConfig
from cvx_plugins.tasks.denoise import in_one_batch
from cvx_plugins.tasks.encode import Encoder
from cvx_plugins.tasks.export import export_adapter, export_model
from cvx_plugins.tasks.loop import Loop
from cvx_plugins.tasks.objective import Diffusion, drawn_timesteps, prediction_loss
from cvx_plugins.tasks.rows import make_loader
from cvx_plugins.tasks.stale import check_cache
from cvx_plugins.tasks.validation import Validation

log = logging.getLogger("cvx")


class Train:
    """The `train` task."""

    def __init__(self, config: TrainConfig, deps: Deps):
        self._config = config
        self._empty: tuple[Tensor, Tensor] | None = None

    def prepare(self, parts: Parts, spec: Spec) -> Parts:
        """Fill `encode` and `forward_backward` with their one-device forms."""
        config = self._config
        check_cache(parts.dataset, spec)
        encoder = Encoder(parts, spec.card, config.image_noise)

        objective = Diffusion(parts.scheduler, config.accumulate)

        def forward_backward(features: Features, draws: Draws) -> Tensor:
            return diffusion_loss(parts, features, draws, config.accumulate)

        return replace(
            parts,
            encoder=encoder,
            encode=encoder.stream,
            objective=objective,
            forward_backward=forward_backward,
            guided=in_one_batch(parts.predictor),
        )

    def run(self, parts: Parts, spec: Spec) -> None:
        """Train to `steps`, or `stop_at`; write log, checkpoints and the export."""
        assert parts.encode is not None
        assert parts.forward_backward is not None
        forward_backward = parts.forward_backward
        if self._config.memory:
            self._fill_memory(parts, spec)
        loader = make_loader(parts, spec, pixels=not self._config.memory)

        def step(work: Work) -> Tensor:
            assert work.features is not None
            return forward_backward(self._drop(work.features, parts, work.draws), work.draws)

        if self._config.text_dropout:
            self._no_text(parts)
        parts.predictor.train()

        def timesteps(work: Work) -> list[str]:
            drawn = drawn_timesteps(parts.scheduler, work.draws)
            return [f"timestep {timestep}" for timestep in drawn.tolist()]

        config, validation = self._config.validation, None
        if config is not None:
            validation = Validation(config, self._config.steps, parts, spec)
        loop = Loop(self._config, parts, spec, parts.predictor, timesteps, validation)
        finished = loop.run(loader, step, parts.encode)
        if finished and parts.adapter is not None:
            export_adapter(parts, spec, None if self._config.merge else self._config.export)
        if finished and self._config.export is not None and (parts.adapter is None or self._config.merge):
            export_model(parts, spec, self._config.export, whole=self._config.export_whole)

    def _fill_memory(self, parts: Parts, spec: Spec) -> None:
        """Encode every row once, before the first step."""
        loader = make_loader(parts, spec, once=True)
        with progress("encode", loader.account().batches) as bar:
            for _, batch in loader.iterate(epochs=1):
                parts.encoder.remember(batch)
                bar.step()

    @torch.no_grad()
    def _no_text(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """Return what stands for no text, asked of the text encoder once: it may leave the device later."""
        if self._empty is None:
            self._empty = parts.encoder.unconditional()
        return self._empty

    def _drop(self, features: Features, parts: Parts, draws: Draws) -> Features:
        """Drop text and image of some rows, so that guidance has an unconditional prediction to use."""
        chances = draws.uniform("dropout", (2,))
        text = chances[:, 0] < self._config.text_dropout
        image = chances[:, 1] < self._config.image_dropout
        if text.any():
            embeds, mask = features.text_embeds.clone(), features.text_mask.clone()
            empty_embeds, empty_mask = self._no_text(parts)
            embeds[text], mask[text] = empty_embeds.to(embeds), empty_mask.to(mask)
            features = features._replace(text_embeds=embeds, text_mask=mask)
        if features.image_latent is not None and image.any():
            kept = features.image_latent.clone()
            kept[image] = 0
            features = features._replace(image_latent=kept)
        return features


def diffusion_loss(parts: Parts, features: Features, draws: Draws, accumulate: int = 1) -> Tensor:
    """Return the loss of one batch after leaving its gradients, divided by `accumulate`.

    The reference weights the error of x0 by 1 / (1 - alpha_bar), which is the plain error of v.
    """
    loss = prediction_loss(parts, features, draws).mean()
    (loss / accumulate).backward()
    return loss.detach()
