"""The videos of a validation: sampled by the model as it is, beside those of the base it started from."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cvx_core.errors import FormatError
from cvx_core.interfaces import Deps, Parts
from cvx_core.spec import Spec
from cvx_io.atomic import write_json
from cvx_io.progress import progress
from cvx_io.record.files import read_object
from cvx_io.video import read_image
from cvx_io.video_grid import GridRow, read_mp4, write_grid
from cvx_io.video_write import to_uint8, write_mp4
from cvx_plugins.tasks import SampleConfig
from cvx_plugins.tasks.sampling import Job, Sampler, check_images, jobs_of, turns
from cvx_plugins.tasks.validation_config import VideosConfig

log = logging.getLogger("cvx")
SHARED_FIELDS = ("steps", "guidance", "dynamic_guidance", "negative_prompt", "videos_per_prompt")


class Videos:
    """Files: <folder>/base/NAME.mp4, <folder>/step-N/NAME.mp4, and <folder>/step-N.mp4 with all of a step."""

    def __init__(self, config: VideosConfig, parts: Parts, spec: Spec, folder: Path):
        """Read prompts and images. Raises where there are none, or not those that the predictor needs."""
        self._parts, self._spec, self._folder = parts, spec, folder
        seed = spec.run.seed if config.seed is None else config.seed
        settings = {name: getattr(config, name) for name in SHARED_FIELDS}
        self._sampler = Sampler(SampleConfig(**settings), parts, spec)
        rows = config.dataset.build(Deps(spec)).rows()
        self._jobs = list(jobs_of(rows, config.videos_per_prompt, seed))
        if not self._jobs:
            raise FormatError("task.validation.videos.dataset: holds no prompt. Add some.")
        check_images(self._jobs, spec)
        for path in {job.row.image for job in self._jobs if job.row.image is not None}:
            read_image(path, spec.video.height, spec.video.width)  # one that cannot be read is said now
        self._steps = config.steps
        shared = {name: spec.resolved[name] for name in ("video", "scheduler")}
        made = [settings, shared, [(job.prompt, job.seed, str(job.row.image)) for job in self._jobs]]
        self._digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]
        self._has_base = False

    def begin(self, step: int, without: AbstractContextManager[None] | None) -> list[str]:
        """Have the base's videos ready for a run that goes on from a step; return what went wrong.

        without: a context in which the predictor is the base, where there is one. Else the base is what the
        predictor is before the first step; later its videos are there, or cannot be made any more.
        """
        if step and self._is_whole(self._folder / "base"):
            self._has_base = True
            return []
        if step and without is None:
            if self._parts.mesh.is_first:
                log.warning(
                    "%s: has not the base's videos of these prompts and settings, and the weights are those "
                    "of step %d by now. Validation shows the trained model alone.",
                    self._folder / "base",
                    step,
                )
            return []
        self._has_base = True
        if without is None:
            return self._sample(self._folder / "base", "sample the base")
        with without:
            return self._sample(self._folder / "base", "sample the base")

    def make(self, step: int, what: str) -> tuple[Path | None, list[str]]:
        """Sample all prompts; return the grid, None where no video came out, and what went wrong.

        Collective. what: what the weights are, above the videos. The first rank writes the grid.
        """
        name = f"step-{step:06d}"
        faults = self._sample(self._folder / name, f"validate step {step}")
        path = self._folder / f"{name}.mp4"
        if self._parts.mesh.is_first:
            self._write_grid(path, name, what)
        return (path if path.exists() else None), faults

    def _sample(self, folder: Path, title: str) -> list[str]:
        """Sample every job into a folder; return what went wrong with some, the same on all ranks.

        A video that fails costs itself: all ranks go through all of it, for they may need each other.
        """
        mesh = self._parts.mesh
        if mesh.is_first and folder.exists():
            shutil.rmtree(folder)
        mesh.barrier()
        own = list(turns([[job] for job in self._jobs], mesh.place("batch"), mesh.size("batch")))
        faults: list[str] = []
        with _at_hand(self._parts), progress(title, len(own) * self._steps) as bar:
            for batch, is_own in own:

                def on_step(number: int = batch[0].index) -> None:
                    bar.step()
                    self._parts.mark(f"validation video {number}")

                [latent] = self._sampler.latents(batch, on_step, refuse=False)
                if is_own:
                    faults += self._write(folder, batch[0], latent)
        return self._told(faults)

    def _write(self, folder: Path, job: Job, latent: torch.Tensor) -> list[str]:
        """Decode and write one video; return why it could not be."""
        if not torch.isfinite(latent).all():
            return [f"{job.name}: its latent is not finite"]
        video = self._sampler.decode(latent)
        if self._parts.mesh.place("model") != 0:
            return []
        try:
            frames = to_uint8(video)
            record = self._sampler.record(job, len(frames), self._digest)
            write_mp4(folder / f"{job.name}.mp4", frames, self._spec.video.fps, record)
            write_json(folder / f"{job.name}.json", record)
        except Exception as error:  # whatever it is, the run goes on without this video
            return [f"{job.name}: {error}"]
        return []

    def _told(self, faults: list[str]) -> list[str]:
        everyone: list[Any] = [faults]
        if (world := self._parts.mesh.degrees.world) > 1:
            everyone *= world
            dist.all_gather_object(everyone, faults)
        return sorted({fault for rank in everyone for fault in rank})

    def _is_whole(self, folder: Path) -> bool:
        """Whether a folder has all videos, made as they would be now; as the first rank sees it."""
        records = [read_object(folder / f"{job.name}.json", []) for job in self._jobs]
        told: list[Any] = [all(record.get("digest") == self._digest for record in records)]
        if self._parts.mesh.degrees.world > 1:
            dist.broadcast_object_list(told, src=0)
        return bool(told[0])

    def _write_grid(self, path: Path, name: str, what: str) -> None:
        folders = [("base", "base")] if self._has_base else []
        folders.append((name, what))
        rows = [
            GridRow(f"{job.prompt} (seed {job.seed})", list(self._cells(job, [f for f, _ in folders])))
            for job in self._jobs
        ]
        path.unlink(missing_ok=True)
        if any(cell is not None for row in rows for cell in row.cells[-1:]):
            caption = " | ".join(title for _, title in folders)
            write_grid(path, [title for _, title in folders], rows, self._spec.video.fps, {"prompt": caption})
            write_json(path.with_suffix(".json"), {"prompt": caption})

    def _cells(self, job: Job, folders: Sequence[str]) -> Iterator[Any]:
        for folder in folders:
            path = self._folder / folder / f"{job.name}.mp4"
            yield read_mp4(path)[0] if path.exists() else None


@contextmanager
def _at_hand(parts: Parts) -> Iterator[None]:
    """Have the encoders on the run's device, and put them back where they were: they may make room there."""
    moved = []
    for module in (parts.text_encoder, parts.autoencoder):
        device = next(module.parameters()).device
        if device.type != parts.device.type:
            moved.append((module, device))
            module.to(parts.device)
    try:
        yield
    finally:
        for module, device in moved:
            module.to(device)
