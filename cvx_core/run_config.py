"""The fields of a recipe that belong to no component: the run itself, the geometry and the loader."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from cvx_core.bucket_config import (
    ASPECTS,
    BucketTable,
    aspect,
    checked_table,
    geometries,
    read_table,
    smallest_batch,
)
from cvx_core.config import Config, NonNegative, OutputPath, PathRole, Positive, Probability
from cvx_core.errors import Problem

if TYPE_CHECKING:
    from cvx_core.spec import Spec

DType = Literal["auto", "float32", "float16", "bfloat16", "float64"]


class VideoConfig(Config):
    """The geometry of every clip of a run; nothing else in a recipe states frames, height, width or fps."""

    frames: Positive = 49
    """Frames per clip."""
    height: Positive = 480
    """Pixels."""
    width: Positive = 720
    """Pixels."""
    fps: Annotated[float, Field(gt=0)] = 8
    """Frames per second that clips are resampled to, and written at."""
    start: Literal["first", "center", "random"] = "first"
    """Which part of a longer clip is taken; `random` is keyed by seed, epoch and row."""
    skip: NonNegative = 0
    """Source frames ignored at both ends of a clip."""
    rule: Literal["fps", "cogvideox"] = "fps"
    """How frames are picked: the one shown at each instant, or in whole steps as the reference pipeline does.
    """
    short: Literal["error", "repeat"] = "error"
    """A clip with fewer frames than asked for is an error, or has its last frame repeated."""


_TABLE_OR_PATH: Any = {"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]}


class LoaderConfig(Config):
    """How rows become batches."""

    batch: Positive = 1
    """Rows per step and data rank (times task.accumulate)."""
    workers: NonNegative = 0
    """Decoding processes, or reading threads where features come from a cache; 0 does it in the main one."""
    shuffle: bool = True
    """Draw a new order every epoch, keyed by seed and epoch."""
    drop_last: bool = True
    """Leave out the rows of an epoch that do not fill a batch; they are counted in the data account."""
    buckets: Annotated[
        BucketTable | None, PathRole(must_exist=True), Field(json_schema_extra=_TABLE_OR_PATH)
    ] = None
    """Resolution -> frames -> [keep_prob, batch], or the path of a YAML file with that: clips are sorted by
    their size and length, and a batch has clips of one bucket. null: one bucket, of the recipe's `video`.
    """
    aspects: Literal["own"] | tuple[str, ...] = ASPECTS
    """Aspect ratios, width:height, of buckets such as 480p; `own` keeps that of every clip."""
    enlarge: Annotated[float, Field(ge=1)] = 1.12
    """By how much, per side, a clip may be enlarged to fill a bucket."""
    unreadable: Literal["error", "skip"] = "error"
    """A clip that cannot be decoded, or is too short, ends the run when it is read; or all clips are decoded
    once before the first step, and those are left out, counted and reported. Buckets leave out in either
    case what they see in a file without decoding it.
    """
    max_drop: Probability | None = None
    """Share of an epoch's rows that may be dropped, those that keep_prob passes over aside, before that is an
    error; null is 0.1 with buckets or `unreadable: skip`, and no limit without.
    """

    @field_validator("buckets", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return read_table(value)

    @field_validator("buckets")
    @classmethod
    def _known(cls, table: BucketTable | None) -> BucketTable | None:
        return checked_table(table) if table is not None else None

    @field_validator("aspects")
    @classmethod
    def _are_ratios(cls, value: Any) -> Any:
        if not value:
            raise ValueError("is empty. Give ratios such as 16:9, or own.")
        for text in value if value != "own" else ():
            aspect(text)
        return value

    @model_validator(mode="after")
    def _batch_of_buckets(self) -> LoaderConfig:
        """With buckets, `batch` is the smallest of theirs, for all that asks before the clips are sorted."""
        if self.buckets is None:
            return self
        smallest = smallest_batch(self.buckets)
        if "batch" in self.model_fields_set and self.batch != smallest:
            raise ValueError(f"batch {self.batch}: each bucket states its own. Remove loader.batch.")
        return self.model_copy(update={"batch": smallest})

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield which buckets the predictor cannot take, and what has no meaning with or without buckets."""
        if self.unreadable == "skip" and "autoencoder" in getattr(spec.config("dataset"), "replaces", ()):
            name = spec.name_of("dataset")
            yield Problem("unreadable", f"is about clips, and dataset {name!r} has none. Leave it out.")
        if self.buckets is None:
            for name in ("aspects", "enlarge"):
                if getattr(self, name) != LoaderConfig.model_fields[name].default:
                    yield Problem(name, "has no effect without loader.buckets. Remove it, or give buckets.")
            return
        task = spec.choices["task"]
        if not getattr(task.config, "buckets", False):
            yield Problem(
                "buckets",
                f"task {task.name!r} works at one geometry. Remove them (--set loader.buckets=null).",
            )
        if getattr(spec.config("dataset"), "replaces", ()):
            name = spec.name_of("dataset")
            yield Problem("buckets", f"sort clips, and dataset {name!r} gives encoded ones. Remove them.")
        usual = {name: field.default for name, field in VideoConfig.model_fields.items()}
        usual |= {name: value for (owner, name), value in spec.card.defaults().items() if owner == "video"}
        for name in ("frames", "height", "width"):
            if name in spec.recipe.data.get("video", {}) and getattr(spec.video, name) != usual[name]:
                yield Problem("buckets", f"state what video.{name} states. Remove one of them.")
        yield from self._geometry_problems(spec)

    def _geometry_problems(self, spec: Spec) -> Iterable[Problem]:
        assert self.buckets is not None
        aspects = ("1:1",) if self.aspects == "own" else self.aspects
        for place, frames, height, width in geometries(self.buckets, aspects, spec.card.size_step):
            for problem in spec.card.geometry(spec.name_of("predictor"), frames, height, width):
                yield Problem(f"buckets.{place}", f"{problem.path}: {problem.message}")


class RunConfig(Config):
    """Top-level fields."""

    cvx: Literal[1] = 1
    """Version of the recipe schema."""
    name: str = "run"
    """Name of the run; the recipe's file name where absent."""
    output: OutputPath | None = None
    """Folder for everything the run writes; runs/<name> where absent."""
    seed: NonNegative = 0
    """Keys every random draw."""
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """`auto` takes the accelerator that is there, else the CPU."""
    dtype: DType = "auto"
    """Precision of weights and activations; `auto`: float32 on the CPU, the predictor's release precision
    elsewhere, but bfloat16 to train a float16 release.
    """
    timeout_s: Annotated[float, Field(gt=0)] = 600
    """Several processes: seconds after which one that does not come, or holds up the others, ends the run."""
    video: VideoConfig = VideoConfig()
    """Geometry."""
    loader: LoaderConfig = LoaderConfig()
    """Batches."""


class TaskConfig(Config):
    """Base of task configs: which sections the task reads. A section it does not read is an error in its
    recipe.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """Sections a recipe must have, some of them by default."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Sections a recipe may have."""
    unbuilt: ClassVar[tuple[str, ...]] = ()
    """Of these, sections that are read for their rules alone: nothing of them is built or loaded."""
    from_features: ClassVar[bool] = False
    """Whether the task can go on from what encoders made of the rows before."""
    trains: ClassVar[str | None] = None
    """The section whose parameters the task trains."""
    of_training: ClassVar[bool] = False
    """Whether the task does for training what has to be done in the precision of training."""
    buckets: ClassVar[bool] = False
    """Whether batches may differ in geometry, so that the recipe may have loader.buckets."""

    @property
    def ranks(self) -> int | None:
        """Ranks that the recipe is about where the task only speaks of them; None: those that run it.

        For such a task nothing is built.
        """
        return None
