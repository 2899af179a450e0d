"""Sample videos: prompts (and images) to mp4, each with a record of how it was made."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cvx_core.errors import CvxError, FormatError
from cvx_core.interfaces import Condition, Deps, Parts, Row
from cvx_core.mesh import Mesh
from cvx_core.spec import Spec
from cvx_io.atomic import atomic_file, write_json
from cvx_io.progress import progress
from cvx_io.video import read_image
from cvx_io.video_write import to_uint8, write_gif, write_mp4, write_sheet
from cvx_plugins.tasks import SampleConfig
from cvx_plugins.tasks.denoise import denoise, in_one_batch
from cvx_plugins.tasks.encode import image_condition
from cvx_plugins.tasks.record import end, write_facts

log = logging.getLogger("cvx")


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


class Sample:
    """The `sample` task."""

    def __init__(self, config: SampleConfig, deps: Deps):
        self._config = config

    def prepare(self, parts: Parts, spec: Spec) -> Parts:
        """Fill `guided` with its one-device form."""
        return replace(parts, guided=in_one_batch(parts.predictor))

    def run(self, parts: Parts, spec: Spec) -> None:
        """Sample every prompt that has no finished video of this recipe yet.

        Data ranks take batches in turns. All of them go through as many, for they may hold parts of the
        predictor for each other; what has no batch left repeats one, and drops the result.
        """
        config, folder, mesh = self._config, spec.output, parts.mesh
        jobs = list(_jobs(parts.dataset.rows(), config.videos_per_prompt, spec.run.seed))
        _check_images(jobs, spec)
        todo = self._todo(jobs, spec, mesh)
        if mesh.is_first:
            write_facts(spec, parts.loaded, parts.device, mesh.degrees.world)
        if len(todo) < len(jobs):
            log.info("%d of %d videos are there already", len(jobs) - len(todo), len(jobs))
        batches = [todo[i : i + config.batch] for i in range(0, len(todo), config.batch)]
        turns = list(_turns(batches, mesh.place("batch"), mesh.size("batch")))
        with progress("sample", len(turns) * config.steps) as bar:
            for batch, is_own in turns:
                latents = self._latents(batch, parts, spec, bar)
                for job, latent in zip(batch, latents, strict=True) if is_own else ():
                    self._write(job, latent, parts, spec)
        mesh.barrier()
        if not mesh.is_first:
            return
        if config.sheet:
            self._write_sheet(folder, jobs, spec)
        end(folder, "Ended, all videos are there")
        log.info("%d videos in %s", len(jobs), folder)

    def _todo(self, jobs: Sequence[Job], spec: Spec, mesh: Mesh) -> list[Job]:
        """Return the jobs without a finished video, as the first rank sees it: others may write by now."""
        told: list[Any] = [None]
        if mesh.is_first:
            told = [[job.index for job in jobs if not self._is_done(spec.output / f"{job.name}.json", spec)]]
        if mesh.degrees.world > 1:
            dist.broadcast_object_list(told, src=0)
        return [jobs[index] for index in told[0]]

    def _is_done(self, record: Path, spec: Spec) -> bool:
        if self._config.overwrite or not record.exists():
            return False
        digest = json.loads(record.read_text(encoding="utf-8")).get("digest")
        if digest != spec.digest:
            raise FormatError(
                f"{record} was made by another recipe ({digest}). Set task.overwrite=true to replace it, "
                "or another output."
            )
        return True

    @torch.no_grad()
    def _latents(self, jobs: Sequence[Job], parts: Parts, spec: Spec, bar: Any) -> Tensor:
        """Return the final latents (B,C,T,h,w) of jobs, without padding."""
        config, device = self._config, parts.device
        generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
        shape = latent_shape(parts, spec)
        images = self._image_latents(jobs, parts, spec, shape, generators)
        noise = torch.stack([self._noise(job, shape, g) for job, g in zip(jobs, generators, strict=True)])
        dtype = next(parts.predictor.parameters()).dtype
        embeds, mask = parts.text_encoder.encode([job.prompt for job in jobs])
        cond = Condition(embeds.to(dtype), mask, images)
        uncond = self._unconditional(len(jobs), parts, images, dtype)
        assert parts.guided is not None

        def on_step() -> None:
            bar.step()
            parts.mark(f"video {jobs[0].index}")

        latent = denoise(
            parts.predictor,
            parts.guided,
            parts.scheduler,
            noise.to(device),
            cond,
            uncond,
            config,
            generators,
            on_step,
        )
        return latent[:, :, spec.card.padding(frames_of(parts, spec)) :]

    def _unconditional(
        self, count: int, parts: Parts, images: Tensor | None, dtype: torch.dtype
    ) -> Condition | None:
        config = self._config
        if not config.is_guided:
            return None
        if config.negative_prompt is None:
            embeds, mask = parts.text_encoder.unconditional(count)
        else:
            embeds, mask = parts.text_encoder.encode([config.negative_prompt] * count)
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
        self, jobs: Sequence[Job], parts: Parts, spec: Spec, shape: tuple[int, ...], generators: Sequence[Any]
    ) -> Tensor | None:
        """Return the conditions (B,C,T,h,w) of the jobs' images, padding included; None for text-to-video."""
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

    @torch.no_grad()
    def _write(self, job: Job, latent: Tensor, parts: Parts, spec: Spec) -> None:
        """Decode one latent (C,T,h,w) and write its files, the record last.

        All ranks that sampled it decode it, for they may do so together; the first of them writes.
        """
        weight = next(parts.autoencoder.parameters())
        video = to_uint8(parts.autoencoder.decode(latent[None].to(weight.device, weight.dtype))[0])
        if parts.mesh.place("model") != 0:
            return
        if len(video) != spec.video.frames:
            log.warning(
                "%s: %d frames came out for %d asked for; an even number of latents decodes to four each",
                job.name,
                len(video),
                spec.video.frames,
            )
        path = spec.output / job.name
        record = self._record(job, len(video), spec)
        fps = spec.video.fps
        if "mp4" in self._config.formats:
            write_mp4(path.with_suffix(".mp4"), video, fps, record)
        if "gif" in self._config.formats:
            write_gif(path.with_suffix(".gif"), video, fps)
        if "png" in self._config.formats:
            write_sheet(path.with_suffix(".png"), [(job.prompt, video)])
        if self._config.save_latents:
            with atomic_file(path.with_suffix(".safetensors")) as partial:
                save_file({"latent": latent.float().cpu().contiguous()}, partial)
        write_json(path.with_suffix(".json"), record)

    def _write_sheet(self, folder: Path, jobs: Sequence[Job], spec: Spec) -> None:
        """Write a few frames of every video, read back from its file, as one picture."""
        reader = spec.choices["reader"].build(Deps(spec))
        clips = []
        for job in jobs:
            with closing(reader.open(folder / f"{job.name}.mp4")) as clip:
                clips.append((job.prompt, clip.frames(range(clip.num_frames))))
        write_sheet(folder / "sheet.png", clips)

    def _record(self, job: Job, frames: int, spec: Spec) -> dict[str, Any]:
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
            "fps": spec.video.fps,
            "adapters": spec.resolved.get("adapters", []),
            "digest": spec.digest,
        }


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


def _jobs(rows: Sequence[Row], videos_per_prompt: int, seed: int) -> Iterator[Job]:
    index = 0
    for row in rows:
        for prompt in row.captions:
            for _ in range(videos_per_prompt):
                yield Job(index, row, prompt, seed + index)
                index += 1


def _turns(batches: Sequence[list[Job]], rank: int, world: int) -> Iterator[tuple[list[Job], bool]]:
    """Yield the batches of one data rank, as many as any rank has, and whether each is its own."""
    for first in range(0, len(batches), world):
        is_own = first + rank < len(batches)
        yield (batches[first + rank], True) if is_own else (batches[first][:1], False)


def _check_images(jobs: Sequence[Job], spec: Spec) -> None:
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
