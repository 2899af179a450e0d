"""Latents and pixels of videos to sample: what the tasks `sample` and `train` (validation) share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cvx_core.errors import CvxError, FormatError
from cvx_core.interfaces import Condition, Parts, Row
from cvx_core.spec import Spec
from cvx_io.video import read_image
from cvx_plugins.tasks import SampleConfig
from cvx_plugins.tasks.denoise import denoise
from cvx_plugins.tasks.encode import image_condition


@dataclass(frozen=True)
class Job:
    """One video to sample. index: its number in the run; seed: keys all of its noise."""

    index: int
    row: Row
    prompt: str
    seed: int

    @property
    def name(self) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:48].strip("-")
        return f"{self.index:04d}-{words}" if words else f"{self.index:04d}"


class Sampler:
    """Samples with the predictor as it is when it is asked; ranks that see the same rows do so together."""

    def __init__(self, config: SampleConfig, parts: Parts, spec: Spec):
        self._config, self._parts, self._spec = config, parts, spec

    @torch.no_grad()
    def latents(self, jobs: Sequence[Job], on_step: Callable[[], None], refuse: bool = True) -> Tensor:
        """Return the final latents (B,C,T,h,w) of jobs, without padding.

        on_step: called after each step. refuse: raise CvxError at the first step whose latent is not finite.
        """
        parts, spec = self._parts, self._spec
        generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
        shape = latent_shape(parts, spec)
        images = self._image_latents(jobs, shape, generators)
        noise = torch.stack([self._noise(job, shape, g) for job, g in zip(jobs, generators, strict=True)])
        dtype = next(parts.predictor.parameters()).dtype
        embeds, mask = parts.text_encoder.encode([job.prompt for job in jobs])
        cond = Condition(embeds.to(dtype), mask, images)
        uncond = self._unconditional(len(jobs), images, dtype)
        assert parts.guided is not None
        latent = denoise(
            parts.predictor,
            parts.guided,
            parts.scheduler,
            noise.to(parts.device),
            cond,
            uncond,
            self._config,
            generators,
            on_step,
            refuse,
        )
        return latent[:, :, spec.card.padding(frames_of(parts, spec)) :]

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Return the video (3,F,H,W) of a latent (C,T,h,w)."""
        weight = next(self._parts.autoencoder.parameters())
        video: Tensor = self._parts.autoencoder.decode(latent[None].to(weight.device, weight.dtype))[0]
        return video

    def record(self, job: Job, frames: int, digest: str) -> dict[str, Any]:
        """Return how a video was made. digest: of what made it."""
        config = self._config
        return {
            "prompt": job.prompt,
            "negative_prompt": config.negative_prompt,
            "image": str(job.row.image) if job.row.image is not None else None,
            "seed": job.seed,
            "steps": config.steps,
            "guidance": config.guidance,
            "dynamic_guidance": config.dynamic_guidance,
            "frames": frames,
            "fps": self._spec.video.fps,
            "adapters": self._spec.resolved.get("adapters", []),
            "digest": digest,
        }

    def _unconditional(self, count: int, images: Tensor | None, dtype: torch.dtype) -> Condition | None:
        config, encoder = self._config, self._parts.text_encoder
        if not config.is_guided:
            return None
        if config.negative_prompt is None:
            embeds, mask = encoder.unconditional(count)
        else:
            embeds, mask = encoder.encode([config.negative_prompt] * count)
        return Condition(embeds.to(dtype), mask, images)

    def _noise(self, job: Job, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return the starting noise (C,T,h,w): from the recipe's file, or drawn with frames before channels.

        That order makes a seed mean the same video as in the diffusers pipelines.
        """
        if self._config.initial_noise is None:
            channels, frames, height, width = shape
            return torch.randn(frames, channels, height, width, generator=generator).transpose(0, 1)
        path = self._config.initial_noise
        with safe_open(path, framework="pt") as file:
            if str(job.index) not in file.keys():  # noqa: SIM118 - not a mapping
                raise FormatError(
                    f"{path}: no noise {str(job.index)!r} for video {job.name}; name one per video."
                )
            noise = file.get_tensor(str(job.index)).float()
        if tuple(noise.shape) != shape:
            raise FormatError(
                f"{path}: noise {job.index} is {list(noise.shape)}, expected {list(shape)} (C,T,h,w)."
            )
        return noise

    def _image_latents(
        self, jobs: Sequence[Job], shape: tuple[int, ...], generators: Sequence[torch.Generator]
    ) -> Tensor | None:
        """Return the conditions (B,C,T,h,w) of the jobs' images, padding included; None for text-to-video."""
        parts, spec = self._parts, self._spec
        if spec.card.image_latent == "none":
            return None
        weight = next(parts.autoencoder.parameters())
        conditions = []
        for job, generator in zip(jobs, generators, strict=True):
            assert job.row.image is not None
            pixels = read_image(job.row.image, spec.video.height, spec.video.width)[:, None]
            scale = parts.autoencoder.scale_factor
            latent = parts.autoencoder.encode(pixels[None].to(weight.device, weight.dtype), generator) / scale
            clean = latent.new_zeros(1, shape[0], frames_of(parts, spec), *shape[2:])
            conditions.append(image_condition(latent, clean, scale, spec.card))
        return torch.cat(conditions).to(next(parts.predictor.parameters()).dtype)


def frames_of(parts: Parts, spec: Spec) -> int:
    """Return the latent frames of a clip, without padding."""
    return (spec.video.frames - 1) // int(parts.autoencoder.compression[0]) + 1


def latent_shape(parts: Parts, spec: Spec) -> tuple[int, int, int, int]:
    """Return (C,T,h,w) of a sampled latent, padding included."""
    _, height, width = parts.autoencoder.compression
    frames = frames_of(parts, spec)
    channels = int(parts.autoencoder.latent_channels)
    return (
        channels,
        frames + spec.card.padding(frames),
        spec.video.height // height,
        spec.video.width // width,
    )


def jobs_of(rows: Sequence[Row], videos_per_prompt: int, seed: int) -> Iterator[Job]:
    """Yield the videos of every prompt, each with a seed of its own."""
    index = 0
    for row in rows:
        for prompt in row.captions:
            for _ in range(videos_per_prompt):
                yield Job(index, row, prompt, seed + index)
                index += 1


def turns(batches: Sequence[list[Job]], rank: int, world: int) -> Iterator[tuple[list[Job], bool]]:
    """Yield the batches of one data rank, as many as any rank has, and whether each is its own."""
    for first in range(0, len(batches), world):
        is_own = first + rank < len(batches)
        yield (batches[first + rank], True) if is_own else (batches[first][:1], False)


def check_images(jobs: Sequence[Job], spec: Spec) -> None:
    """Raise where a predictor gets no image it needs, or images it would not look at."""
    name = spec.name_of("predictor")
    with_image = [job for job in jobs if job.row.image is not None]
    if spec.card.image_latent == "none" and with_image:
        raise CvxError(
            f"{len(with_image)} rows have an image, but predictor {name!r} is text-to-video. "
            "Use an image-to-video predictor, or a dataset without images."
        )
    if spec.card.image_latent != "none" and len(with_image) < len(jobs):
        missing = next(job for job in jobs if job.row.image is None)
        raise CvxError(
            f"predictor {name!r} is image-to-video, but {len(jobs) - len(with_image)} rows have no image, "
            f"first {missing.row.id!r}. Give `images:` in the dataset."
        )
