"""From batches to features: the one-device default of `parts.encode`, with an optional memory of what it
encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvx_core.card import Card
from cvx_core.interfaces import Batch, Features, Parts, Work
from cvx_core.random import Draws


class Moments(NamedTuple):
    """A posterior's mean and standard deviation, unscaled, each (C,T,h,w)."""

    mean: Tensor
    std: Tensor


class Encoded(NamedTuple):
    """What is kept of one row: moments of its video, and of its image where the predictor takes one."""

    video: Moments
    image: Moments | None


class Encoder:
    """Encodes batches for training. What `remember` was given is never encoded again.

    Rows go through the encoders one at a time: what a row becomes does not depend, not in the last bit, on
    the rows beside it, and so not on how many ranks share a batch.

    Slots: moments_of(video) returns mean and standard deviation of the posterior, each (B,C,T,h,w);
    embeds_of(prompts) returns embeddings (B,L,D) and mask (B,L).
    """

    def __init__(self, parts: Parts, card: Card, image_noise: tuple[float, float] | None):
        """image_noise: mean and deviation of the log of the pixel noise on images; None adds none."""
        self._parts, self._card, self._image_noise = parts, card, image_noise
        self._rows: dict[str, Encoded] = {}
        self._texts: dict[str, tuple[Tensor, Tensor]] = {}
        self.moments_of: Callable[[Tensor], tuple[Tensor, Tensor]] = row_by_row(parts.autoencoder.moments)
        self.embeds_of: Callable[[Sequence[str]], tuple[Tensor, Tensor]] = row_by_row(
            parts.text_encoder.encode
        )

    def stream(self, works: Iterator[Work]) -> Iterator[Work]:
        """Yield work with its features: the default of `parts.encode`."""
        for work in works:
            yield work._replace(features=self(work.batch, work.draws))

    @torch.no_grad()
    def remember(self, batch: Batch) -> None:
        """Encode the rows of a batch, and every caption they have, and keep the result in memory."""
        encoded = self._encode(batch, None)
        self._rows |= {row.id: item for row, item in zip(batch.rows, encoded, strict=True)}
        captions = dict.fromkeys(caption for row in batch.rows for caption in row.captions or ("",))
        new = [caption for caption in captions if caption not in self._texts]
        if new:
            embeds, masks = self.embeds_of(new)
            self._texts |= {text: (e, m) for text, e, m in zip(new, embeds, masks, strict=True)}

    @torch.no_grad()
    def __call__(self, batch: Batch, draws: Draws) -> Features:
        """Return features of a batch; posterior and pixel noise are drawn row by row."""
        known = all(row.id in self._rows for row in batch.rows)
        encoded = [self._rows[row.id] for row in batch.rows] if known else self._encode(batch, draws)
        scale = self._parts.autoencoder.scale_factor
        videos, images = draws.of("posterior"), draws.of("image-posterior")
        latent = torch.stack([scale * draw(item.video, g) for item, g in zip(encoded, videos, strict=True)])
        drawn = [
            draw(item.image, g) for item, g in zip(encoded, images, strict=True) if item.image is not None
        ]
        condition = image_condition(torch.stack(drawn), latent, scale, self._card) if drawn else None
        return Features(pad_front(latent, self._card), *self._text(batch.prompts), condition)

    def _text(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return embeddings (B,L,D) and mask (B,L) of prompts."""
        if any(prompt not in self._texts for prompt in prompts):
            return self.embeds_of(prompts)
        found = [self._texts[prompt] for prompt in prompts]
        return torch.stack([embeds for embeds, _ in found]), torch.stack([mask for _, mask in found])

    def _encode(self, batch: Batch, draws: Draws | None) -> list[Encoded]:
        """Return the moments of every row; `draws` gives the pixel noise on images, if there is any."""
        assert batch.video is not None
        videos = self._moments(batch.video)
        if self._card.image_latent == "none":
            return [Encoded(video, None) for video in videos]
        assert batch.image is not None
        images = self._moments(self._noised(batch.image, draws)[:, :, None])
        return [Encoded(video, image) for video, image in zip(videos, images, strict=True)]

    def _moments(self, video: Tensor) -> list[Moments]:
        weight = next(self._parts.autoencoder.parameters())
        mean, std = self.moments_of(video.to(weight.device, weight.dtype))
        return [Moments(m, s) for m, s in zip(mean, std, strict=True)]

    def _noised(self, images: Tensor, draws: Draws | None) -> Tensor:
        """Add pixel noise of a log-normal strength per row (the reference: mean -3, deviation 0.5)."""
        if self._image_noise is None or draws is None:
            return images
        mean, deviation = self._image_noise
        noisy = []
        for image, generator in zip(images, draws.of("pixels"), strict=True):
            sigma = torch.exp(mean + deviation * torch.randn((), generator=generator))
            noisy.append(image + sigma * torch.randn(image.shape, generator=generator))
        return torch.stack(noisy)


def row_by_row(function: Callable[[Any], tuple[Tensor, Tensor]]) -> Callable[[Any], tuple[Tensor, Tensor]]:
    """Return a function of B rows that runs on one at a time and returns two tensors with B rows."""

    def each(rows: Any) -> tuple[Tensor, Tensor]:
        done = [function(rows[i : i + 1]) for i in range(len(rows))]
        return torch.cat([first for first, _ in done]), torch.cat([second for _, second in done])

    return each


def draw(moments: Moments, generator: torch.Generator) -> Tensor:
    """Draw from a posterior with a CPU generator, so that every device sees the same noise."""
    noise = torch.randn(moments.mean.shape, generator=generator)
    return moments.mean + moments.std * noise.to(moments.mean)


def image_condition(image: Tensor, latent: Tensor, scale: float, card: Card) -> Tensor:
    """Place an unscaled image latent (B,C,1,h,w) at frame 0 of zeros shaped like `latent`, padded as latents
    are.

    Three conventions are in use (scaled, unscaled, divided); the card names the release's, and training
    follows the same one as sampling, so that a fine-tuned model sees what it was trained on.
    """
    factor = {"scaled": scale, "unscaled": 1.0, "divided": 1 / scale}[card.image_latent]
    batch, channels, frames, height, width = latent.shape
    condition = latent.new_zeros(batch, channels, frames + card.padding(frames), height, width)
    condition[:, :, :1] = image * factor
    return condition


def pad_front(latent: Tensor, card: Card) -> Tensor:
    """Repeat the first latent frame in front until patches in time fit."""
    count = card.padding(latent.shape[2])
    return torch.cat([latent[:, :, :1].expand(-1, -1, count, -1, -1), latent], dim=2) if count else latent
