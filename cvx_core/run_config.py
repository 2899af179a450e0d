"""The fields of a recipe that belong to no component: the run itself, the geometry and the loader."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cvx_core.config import Config, NonNegative, OutputPath, Positive

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


class LoaderConfig(Config):
    """How rows become batches."""

    batch: Positive = 1
    """Rows per step and data rank (times task.accumulate)."""
    workers: NonNegative = 0
    """Decoding processes; 0 decodes in the main process."""
    shuffle: bool = True
    """Draw a new order every epoch, keyed by seed and epoch."""
    drop_last: bool = True
    """Leave out the rows of an epoch that do not fill a batch; they are counted in the data account."""


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
    elsewhere.
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
    trains: ClassVar[str | None] = None
    """The section whose parameters the task trains."""

    @property
    def ranks(self) -> int | None:
        """Ranks that the recipe is about where the task only speaks of them; None: those that run it.

        For such a task nothing is built.
        """
        return None
