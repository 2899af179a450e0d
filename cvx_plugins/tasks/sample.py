"""Sample videos: prompts (and images) to mp4, each with a record of how it was made."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from cvx_core.errors import FormatError
from cvx_core.interfaces import Deps, Parts
from cvx_core.mesh import Mesh
from cvx_core.spec import Spec
from cvx_io.atomic import atomic_file, write_json
from cvx_io.progress import progress
from cvx_io.video_write import to_uint8, write_gif, write_mp4, write_sheet
from cvx_plugins.tasks import SampleConfig
from cvx_plugins.tasks.denoise import in_one_batch
from cvx_plugins.tasks.record import recorded
from cvx_plugins.tasks.sampling import Job, Sampler, check_images, jobs_of, turns

log = logging.getLogger("cvx")


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
        config = self._config
        jobs = list(jobs_of(parts.dataset.rows(), config.videos_per_prompt, spec.run.seed))
        check_images(jobs, spec)
        todo = self._todo(jobs, spec, parts.mesh)
        if len(todo) < len(jobs):
            log.info("%d of %d videos are there already", len(jobs) - len(todo), len(jobs))
        with recorded(parts, spec, "Ended, all videos are there"):
            self._sample(todo, parts, spec)
            parts.mesh.barrier()
            if config.sheet and parts.mesh.is_first:
                self._write_sheet(spec.output, jobs, spec)
        if parts.mesh.is_first:
            log.info("%d videos in %s", len(jobs), spec.output)

    def _sample(self, todo: list[Job], parts: Parts, spec: Spec) -> None:
        config, mesh = self._config, parts.mesh
        batches = [todo[i : i + config.batch] for i in range(0, len(todo), config.batch)]
        own = list(turns(batches, mesh.place("batch"), mesh.size("batch")))
        sampler = Sampler(config, parts, spec)
        with progress("sample", len(own) * config.steps) as bar:
            for batch, is_own in own:

                def on_step(number: int = batch[0].index) -> None:
                    bar.step()
                    parts.mark(f"video {number}")

                latents = sampler.latents(batch, on_step)
                for job, latent in zip(batch, latents, strict=True) if is_own else ():
                    self._write(job, latent, parts, spec)

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

    def _write(self, job: Job, latent: Tensor, parts: Parts, spec: Spec) -> None:
        """Decode one latent (C,T,h,w) and write its files, the record last.

        All ranks that sampled it decode it, for they may do so together; the first of them writes.
        """
        sampler = Sampler(self._config, parts, spec)
        video = to_uint8(sampler.decode(latent))
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
        record = sampler.record(job, len(video), spec.digest)
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
