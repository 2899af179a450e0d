"""From batches to features: the one-device default of `parts.encode`.

What a row becomes has two halves. Encoding it gives moments and embeddings, which depend on nothing but the
row; they may come from a cache of features, from memory, or from the encoders. Then latents are drawn from
the moments, the same in all three cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cvx_core.card import Card
from cvx_core.interfaces import Batch, Features, Parts, Work
from cvx_core.random import Draws
from cvx_io.cache.items import Encoded, Moments, Text


class Encoder:
    """Encodes batches for training. What `remember` was given, or came encoded, is not encoded again.

    Rows go through the encoders one at a time: what a row becomes does not depend, not in the last bit, on
    the rows beside it, and so not on how many ranks share a batch.

    Slots: moments_of(video) returns mean and standard deviation of the posterior, each (B,C,T,h,w);
    embeds_of(prompts) returns embeddings (B,L,D) and mask (B,L). Neither is called where the dataset replaces
    its encoder.
    """

    def __init__(self, parts: Parts, card: Card, image_noise: tuple[float, float] | None):
        """image_noise: mean and deviation of the log of the pixel noise on images; None adds none."""
        self._parts, self._card, self._image_noise = parts, card, image_noise
        self._rows: dict[str, Encoded] = {}
        self._texts: dict[str, Text] = {}
        self.moments_of: Callable[[Tensor], tuple[Tensor, Tensor]] = row_by_row(
            lambda video: parts.autoencoder.moments(video)
        )
        self.embeds_of: Callable[[Sequence[str]], tuple[Tensor, Tensor]] = row_by_row(
            lambda prompts: parts.text_encoder.encode(prompts)
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
            self._texts |= dict(zip(new, self.texts(new), strict=True))

    @torch.no_grad()
    def __call__(self, batch: Batch, draws: Draws) -> Features:
        """Return features of a batch; posterior and pixel noise are drawn row by row."""
        encoded, scale = self._encoded(batch, draws), self.scale
        latent = scale * draw([item.video for item in encoded if item.video], draws, "posterior")
        images = [item.image for item in encoded if item.image]
        condition = None
        if images:
            condition = image_condition(draw(images, draws, "image-posterior"), latent, scale, self._card)
        return Features(pad_front(latent, self._card), *self._text(batch.prompts, encoded), condition)

    @torch.no_grad()
    def moments(self, video: Tensor) -> list[Moments]:
        """Return the moments of each video of (B,3,F,H,W)."""
        weight = next(self._parts.autoencoder.parameters())
        mean, std = self.moments_of(video.to(weight.device, weight.dtype))
        return [Moments(m, s) for m, s in zip(mean, std, strict=True)]

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> list[Text]:
        """Return embeddings and mask of each caption."""
        embeds, masks = self.embeds_of(captions)
        return [Text(e, m) for e, m in zip(embeds, masks, strict=True)]

    @torch.no_grad()
    def unconditional(self) -> Text:
        """Return what stands for no prompt."""
        if self._parts.text_encoder is None:
            return Text(*(t.to(self._parts.device) for t in self._parts.dataset.unconditional()))
        embeds, mask = self._parts.text_encoder.unconditional(1)
        return Text(embeds[0], mask[0])

    @property
    def scale(self) -> float:
        """What latents are multiplied by."""
        source = self._parts.autoencoder if self._parts.autoencoder is not None else self._parts.dataset
        return float(source.scale_factor)

    def _encoded(self, batch: Batch, draws: Draws) -> Sequence[Encoded]:
        if batch.encoded is not None:
            device = self._parts.device
            return batch.encoded if device.type == "cpu" else [_on(item, device) for item in batch.encoded]
        if all(row.id in self._rows for row in batch.rows):
            return [self._rows[row.id] for row in batch.rows]
        return self._encode(batch, draws)

    def _text(self, prompts: Sequence[str], encoded: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Return embeddings (B,L,D) and mask (B,L) of prompts."""
        found = [item.text or self._texts.get(prompt) for item, prompt in zip(encoded, prompts, strict=True)]
        if any(text is None for text in found):
            return self.embeds_of(prompts)
        return torch.stack([t.embeds for t in found if t]), torch.stack([t.mask for t in found if t])

    def _encode(self, batch: Batch, draws: Draws | None) -> list[Encoded]:
        """Return the moments of every row; `draws` gives the pixel noise on images, if there is any."""
        assert batch.video is not None
        videos = self.moments(batch.video)
        if self._card.image_latent == "none":
            return [Encoded(video) for video in videos]
        assert batch.image is not None
        images = self.moments(self._noised(batch.image, draws)[:, :, None])
        return [Encoded(video, image) for video, image in zip(videos, images, strict=True)]

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


def _on(item: Encoded, device: Any) -> Encoded:
    """Return the same on a device."""
    video = Moments(*(t.to(device) for t in item.video)) if item.video else None
    image = Moments(*(t.to(device) for t in item.image)) if item.image else None
    return Encoded(video, image, Text(*(t.to(device) for t in item.text)) if item.text else None)


def row_by_row(function: Callable[[Any], tuple[Tensor, Tensor]]) -> Callable[[Any], tuple[Tensor, Tensor]]:
    """Return a function of B rows that runs on one at a time and returns two tensors with B rows."""

    def each(rows: Any) -> tuple[Tensor, Tensor]:
        done = [function(rows[i : i + 1]) for i in range(len(rows))]
        return torch.cat([first for first, _ in done]), torch.cat([second for _, second in done])

    return each


def draw(moments: Sequence[Moments], draws: Draws, what: str) -> Tensor:
    """Draw (B,C,T,h,w) from posteriors, with noise from the CPU: every device sees the same."""
    means, stds = (torch.stack(parts) for parts in zip(*moments, strict=True))
    return means + stds * draws.normal(what, means.shape[1:]).to(means)


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
