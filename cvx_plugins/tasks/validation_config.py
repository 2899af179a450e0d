"""Fields of `task.validation`: what is measured and sampled while a predictor trains. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

from pydantic import Field

from cvx_core import Problem
from cvx_core.config import Config, NonNegative, Positive
from cvx_core.spec import Spec


class HeldOutConfig(Config):
    """Rows that are never trained on, and how their loss is measured: as the task `evaluate` does."""

    nested: ClassVar = {"dataset": "dataset"}

    dataset: Any = None
    """The rows: clips where the run trains on clips, encoded ones where it trains on those."""
    rows: Positive | None = 64
    """Rows that are used, the first ones; null uses all. What they are encoded to stays in host memory."""
    bands: Annotated[int, Field(ge=1, le=1000)] = 4
    """Equal bands of timesteps."""
    draws: Positive = 1
    """Noise draws per row and band."""


class VideosConfig(Config):
    """Videos of the same prompts with the same noise at every validation, beside those of the base."""

    nested: ClassVar = {"dataset": "dataset"}

    dataset: Any = None
    """The prompts, with images for an image-to-video predictor, such as `{use: prompts, path: ...}`."""
    seed: NonNegative | None = None
    """Keys the noise; null is the run's."""
    videos_per_prompt: Positive = 1
    """Videos per prompt, each with its own seed."""
    steps: Positive = 50
    """Sampling steps."""
    guidance: Annotated[float, Field(ge=0.0)] = 6.0
    """Classifier-free guidance scale; 1 needs no unconditional prediction."""
    dynamic_guidance: bool = False
    """Let the guidance weight follow the timestep."""
    negative_prompt: str | None = None
    """What the unconditional prediction is conditioned on; null: the text encoder's unconditional embedding.
    """


class ValidationConfig(Config):
    """Look at the model while it trains. Training is bit for bit what it is without."""

    every: Positive = 500
    """Optimizer steps from one validation to the next; the last step of the run has one too."""
    at_start: bool = True
    """Validate before the first step too."""
    loss: HeldOutConfig | None = None
    """Loss per band of timesteps on held-out rows; null measures none."""
    videos: VideosConfig | None = None
    """Videos of fixed prompts; null samples none."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield what has nothing to do, or lacks what it needs; paths start at the task."""
        if self.loss is None and self.videos is None:
            yield Problem("validation", "has nothing to do. Add `loss`, `videos` or both.")
        if self.loss is not None:
            yield from _check_dataset("loss", self.loss.dataset, spec)
            if self.loss.dataset is not None:
                yield from _check_kind(self.loss.dataset, spec)
        if self.videos is not None:
            yield from _check_dataset("videos", self.videos.dataset, spec)
            yield from _check_videos(self.videos, spec)


def _check_dataset(section: str, dataset: Any, spec: Spec) -> Iterable[Problem]:
    if dataset is None:
        yield Problem(f"validation.{section}.dataset", "is required. Add `dataset: {use: ..., path: ...}`.")
        return
    for problem in dataset.config.check(spec):
        yield Problem(f"validation.{section}.dataset.{problem.path}", problem.message)


def _check_kind(held_out: Any, spec: Spec) -> Iterable[Problem]:
    """Yield that held-out rows need encoders that are not built, or are encoded where nothing else is."""
    ours, theirs = getattr(spec.config("dataset"), "replaces", ()), getattr(held_out.config, "replaces", ())
    if set(ours) != set(theirs):
        kinds = [
            f"{what} of {name!r}"
            for what, name in (
                ("encoded rows" if ours else "clips", spec.name_of("dataset")),
                ("encoded rows" if theirs else "clips", held_out.name),
            )
        ]
        yield Problem(
            "validation.loss.dataset",
            f"the run trains on {kinds[0]}, and these are {kinds[1]}. "
            + ("Precompute these too." if ours else "Name the clips themselves."),
        )


def _check_videos(videos: VideosConfig, spec: Spec) -> Iterable[Problem]:
    where = "validation.videos"
    if missing := [name for name in ("text_encoder", "autoencoder") if name in spec.unbuilt]:
        yield Problem(
            where,
            f"need the {' and the '.join(missing)}, which dataset {spec.name_of('dataset')!r} leaves "
            "unbuilt. "
            "Keep `loss` alone here, and sample checkpoints with `task: {use: sample}`.",
        )
    if getattr(getattr(videos.dataset, "config", None), "replaces", ()):
        yield Problem(f"{where}.dataset", f"{videos.dataset.name!r} has encoded rows. Name prompts.")
    if spec.loader.buckets is not None:
        yield Problem(
            where,
            "are of one size, and loader.buckets leave none to choose. Keep `loss` alone here, and sample "
            "checkpoints with `task: {use: sample}`.",
        )
