"""Train an autoencoder: reconstruction plus a weak pull of the posterior towards a unit Gaussian."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cvx_core.errors import CvxError
from cvx_core.interfaces import Deps, Parts, Work
from cvx_core.spec import Spec
from cvx_plugins.tasks import TrainAutoencoderConfig
from cvx_plugins.tasks.export import export_component
from cvx_plugins.tasks.loop import Loop
from cvx_plugins.tasks.rows import make_loader

log = logging.getLogger("cvx")
DISTANCES = {"l1": F.l1_loss, "l2": F.mse_loss}


class TrainAutoencoder:
    """The `train-autoencoder` task."""

    def __init__(self, config: TrainAutoencoderConfig, deps: Deps):
        self._config = config

    def prepare(self, parts: Parts, spec: Spec) -> Parts:
        """This task calls the autoencoder directly."""
        return parts

    def run(self, parts: Parts, spec: Spec) -> None:
        """Train to `steps`, or `stop_at`; write log, checkpoints and the export."""
        autoencoder, config = parts.autoencoder, self._config
        weight = next(autoencoder.parameters())

        def step(work: Work) -> Tensor:
            assert work.batch.video is not None
            video = work.batch.video.to(weight.device, weight.dtype)
            loss = self.loss(autoencoder, video, work.draws.of("noise"))
            (loss / config.accumulate).backward()
            return loss.detach()

        autoencoder.train()
        finished = Loop(config, parts, spec, autoencoder).run(make_loader(parts, spec), step)
        if finished and config.export is not None:
            choice = spec.choices["autoencoder"]
            if config.measure_scale:
                scale = round(1 / self.latent_deviation(parts, spec), 4)
                log.info("scale factor of the latents: %g", scale)
                choice = replace(choice, config=choice.config.model_copy(update={"scale_factor": scale}))
            export_component(autoencoder, choice, spec.output / "model", config.export, spec, parts.mesh)

    @torch.no_grad()
    def latent_deviation(self, parts: Parts, spec: Spec) -> float:
        """Return the standard deviation of unscaled latents over the clips, posterior noise included."""
        weight = next(parts.autoencoder.parameters())
        squares, sums, count = 0.0, 0.0, 0
        for _, batch in make_loader(parts, spec, once=True).iterate(epochs=1):
            assert batch.video is not None
            mean, std = parts.autoencoder.moments(batch.video.to(weight.device, weight.dtype))
            squares += float((mean.double() ** 2 + std.double() ** 2).sum())
            sums += float(mean.double().sum())
            count += mean.numel()
        mean, square = sums / count, squares / count
        if (group := parts.mesh.group("batch")) is not None:  # ranks have as many values each
            both = torch.tensor([mean, square], device=parts.device)
            dist.all_reduce(both, group=group)
            mean, square = (both / parts.mesh.size("batch")).tolist()
        return float((square - mean**2) ** 0.5)

    def loss(
        self, autoencoder: torch.nn.Module, video: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Return the loss of a video batch (B,3,F,H,W) per pixel, at least float32. generators: one a row.

        KL divergence of a diagonal Gaussian from the unit one: Kingma & Welling 2014, appendix B.
        """
        reconstruction, mean, logvar = autoencoder.reconstruct(video, generators)  # type: ignore[operator]
        if reconstruction.shape != video.shape:
            raise CvxError(
                f"video.frames {video.shape[2]}: the reconstruction has {reconstruction.shape[2]} frames. "
                "Use a number of frames that comes back as it is, such as 1, 9 or 17."
            )
        distances = [DISTANCES[name] for name in self._config.reconstruction.split("+")]
        wide = torch.promote_types(video.dtype, torch.float32)
        error = sum(distance(reconstruction.to(wide), video.to(wide)) for distance in distances)
        mean, logvar = mean.to(wide), logvar.to(wide)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return error + self._config.kl_weight * kl
