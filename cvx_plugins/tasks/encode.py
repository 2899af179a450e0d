"""From batches to features: the one-device default of `parts.encode`, with an optional memory of what it
encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cvx_core.card import Card
from cvx_core.interfaces import Batch, Features, Parts, Row


class Moments(NamedTuple):
    """A posterior's mean and standard deviation, unscaled, each (C,T,h,w)."""

    mean: Tensor
    std: Tensor


class Encoder:
    """Encodes batches for training; with memory, each row's moments and each prompt's text just once."""

    def __init__(self, parts: Parts, card: Card, image_noise: tuple[float, float] | None, memory: bool):
        self._parts, self._card, self._image_noise, self._memory = parts, card, image_noise, memory
        self._latents: dict[str, Moments] = {}
        self._images: dict[str, Moments] = {}
        self._texts: dict[str, tuple[Tensor, Tensor]] = {}

    def remembers(self, row: Row) -> bool:
        """Tell whether a row needs no pixels any more."""
        return row.id in self._latents and (self._card.image_latent == "none" or self._image_noise is None)

    @torch.no_grad()
    def __call__(self, batch: Batch, generator: torch.Generator) -> Features:
        """Return features of a batch; posterior and pixel noise are drawn from `generator`, row by row."""
        scale = self._parts.autoencoder.scale_factor
        latent = torch.stack([scale * draw(moments, generator) for moments in self._moments(batch)])
        embeds, mask = self.text(batch.prompts)
        image = self._image_latent(batch, latent, generator) if self._card.image_latent != "none" else None
        return Features(pad_front(latent, self._card), embeds, mask, image)

    def text(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return embeddings (B,L,D) and mask (B,L) of prompts."""
        if not self._memory:
            return self._parts.text_encoder.encode(prompts)
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        for prompt, embeds, mask in (
            zip(new, *self._parts.text_encoder.encode(new), strict=True) if new else ()
        ):
            self._texts[prompt] = (embeds, mask)
        found = [self._texts[prompt] for prompt in prompts]
        return torch.stack([embeds for embeds, _ in found]), torch.stack([mask for _, mask in found])

    def _moments(self, batch: Batch) -> list[Moments]:
        new = [i for i, row in enumerate(batch.rows) if row.id not in self._latents]
        fresh: dict[str, Moments] = {}
        if new:
            assert batch.video is not None
            mean, std = self._parts.autoencoder.moments(self._pixels(batch.video[new]))
            fresh = {batch.rows[i].id: Moments(mean[k], std[k]) for k, i in enumerate(new)}
        if self._memory:
            self._latents |= fresh
            fresh = self._latents
        return [fresh[row.id] for row in batch.rows]

    def _image_latent(self, batch: Batch, latent: Tensor, generator: torch.Generator) -> Tensor:
        """Return the first-frame condition (B,C,T,h,w): the noised image at frame 0, zeros after it."""
        if self._image_noise is None and self._memory:
            moments = self._image_moments(batch)
        else:
            moments = self._encode_images(self._add_noise(first_frames(batch), generator))
        image = torch.stack([draw(m, generator) for m in moments])
        return image_condition(image, latent, self._parts.autoencoder.scale_factor, self._card)

    def _image_moments(self, batch: Batch) -> list[Moments]:
        if any(row.id not in self._images for row in batch.rows):
            for row, moments in zip(batch.rows, self._encode_images(first_frames(batch)), strict=True):
                self._images.setdefault(row.id, moments)
        return [self._images[row.id] for row in batch.rows]

    def _encode_images(self, images: Tensor) -> list[Moments]:
        mean, std = self._parts.autoencoder.moments(self._pixels(images)[:, :, None])
        return [Moments(m, s) for m, s in zip(mean, std, strict=True)]

    def _add_noise(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Add pixel noise of a log-normal strength per row (the reference: mean -3, deviation 0.5)."""
        if self._image_noise is None:
            return images
        mean, deviation = self._image_noise
        sigma = torch.exp(mean + deviation * torch.randn(len(images), generator=generator))
        noise = torch.randn(images.shape, generator=generator)
        return images + sigma.view(-1, 1, 1, 1) * noise

    def _pixels(self, video: Tensor) -> Tensor:
        weight = next(self._parts.autoencoder.parameters())
        return video.to(weight.device, weight.dtype)


def draw(moments: Moments, generator: torch.Generator) -> Tensor:
    """Draw from a posterior with a CPU generator, so that every device sees the same noise."""
    noise = torch.randn(moments.mean.shape, generator=generator)
    return moments.mean + moments.std * noise.to(moments.mean)


def first_frames(batch: Batch) -> Tensor:
    """Return the condition images (B,3,H,W): the rows' own, else the first frame of each clip."""
    if batch.image is not None:
        return batch.image
    assert batch.video is not None
    return batch.video[:, :, 0]


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
