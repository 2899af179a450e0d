"""Configs of the datasets whose rows have been encoded before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from cvx_core import Component, Config
from cvx_core.config import InputPath
from cvx_core.errors import Problem
from cvx_plugins.datasets.config import Key

if TYPE_CHECKING:
    from cvx_core.spec import Spec

MADE = ("text_encoder", "autoencoder", "reader")


class FeatureCacheConfig(Config):
    """Fields of `feature-cache`: rows that the precompute task has encoded."""

    replaces: ClassVar[tuple[str, ...]] = MADE  # sections whose work is done

    path: InputPath | None = None
    """The output folder of a precompute run."""
    rows: Key = "all"
    """Which of its lists of rows."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        if self.path is None:
            yield Problem("path", "is missing; name the output folder of a precompute run.")
        yield from unread(spec)


class NpzCacheConfig(Config):
    """Fields of `npz-cache`: a CSV table beside latents, and perhaps embeddings, in .npz files.

    Such files do not say what they were made with, so that nothing but shapes and fps can be compared.
    """

    path: InputPath | None = None
    """A UTF-8 CSV table with a header."""
    latents: InputPath | None = None
    """Folder of the latents: a video's path with the suffix .npz, holding latent_mean, latent_std, fps."""
    texts: InputPath | None = None
    """Folder of the embeddings, likewise, holding text_emb (L,D) and mask (L,). null: the recipe's text
    encoder embeds the captions.
    """
    unconditional: InputPath | None = None
    """With `texts`: the .npz file of what stands for no prompt, which training with text_dropout needs."""
    layout: Literal["tchw", "cthw"] = "tchw"
    """Order of the dims of a latent."""
    fps: Literal["check", "ignore"] = "check"
    """Whether an fps in a file that is not video.fps is an error."""
    video_column: Key = "video"
    """Column of the video's path; the file need not exist."""
    caption_column: Key = "caption"
    """Column of the caption."""
    delimiter: Key = ","
    """What separates the columns."""

    @property
    def replaces(self) -> tuple[str, ...]:
        return MADE if self.texts is not None else MADE[1:]

    def check(self, spec: Spec) -> Iterable[Problem]:
        for name in ("path", "latents"):
            if getattr(self, name) is None:
                yield Problem(name, "is missing; name the table, and the folder of its latents.")
        if self.unconditional is not None and self.texts is None:
            yield Problem("unconditional", "has no effect without `texts`. Remove it, or add texts.")
        if not getattr(spec.config("autoencoder"), "scale_factor", spec.card.latent_scale):
            yield Problem("", "nothing says what to multiply latents by. Add `autoencoder`.")
        if spec.card.image_latent != "none":
            name = spec.name_of("predictor")
            yield Problem("", f"has no image latents, which predictor {name!r} needs. Precompute the clips.")
        yield from unread(spec)


def unread(spec: Spec) -> Iterable[Problem]:
    """Yield why rows that are encoded before cannot be used, and what they leave without effect."""
    task = spec.choices["task"]
    if not getattr(task.config, "from_features", False):
        yield Problem("use", f"task {task.name!r} needs clips, not what was made of them. Name the clips.")
    if "reader" in spec.recipe.data:
        yield Problem("use", "decodes nothing, so the recipe's reader has no effect. Remove that section.")
    if getattr(spec.loader, "buckets", None) is not None:
        yield Problem(
            "use", "has rows of one geometry each, which loader.buckets cannot sort. Remove loader.buckets."
        )


def components() -> Iterable[Component]:
    """Yield the datasets."""
    yield Component(
        "dataset",
        "feature-cache",
        FeatureCacheConfig,
        "cvx_plugins.datasets.cached:FeatureCache",
        summary="rows that the precompute task has encoded",
    )
    yield Component(
        "dataset",
        "npz-cache",
        NpzCacheConfig,
        "cvx_plugins.datasets.npz:NpzCache",
        summary="a CSV table beside latents and embeddings in .npz files",
    )
