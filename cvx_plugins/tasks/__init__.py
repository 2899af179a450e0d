"""The built-in tasks: their fields and the sections they read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cvx_core import Component, InputPath, PluginError, Problem, hookimpl
from cvx_core.config import NonNegative, Positive, Probability
from cvx_core.registry import Choice
from cvx_core.run_config import TaskConfig
from cvx_core.spec import Spec
from cvx_plugins.tasks import inspect_data
from cvx_plugins.tasks.ema_config import EmaConfig
from cvx_plugins.tasks.validation_config import ValidationConfig

NonNegativeFloat = Annotated[float, Field(ge=0.0)]
Schedule = Literal["constant", "linear", "cosine", "cosine-restarts", "polynomial"]
MODELS = ("predictor", "text_encoder", "autoencoder", "scheduler")


class LoopConfig(TaskConfig):
    """The optimisation loop, shared by the tasks that train."""

    buckets: ClassVar = True

    steps: Positive = 1000
    """Optimizer steps of the whole run; the learning-rate schedule is laid out over them."""
    stop_at: Positive | None = None
    """Save and stop after this step, the schedule still laid out over `steps`."""
    accumulate: Positive = 1
    """Batches per optimizer step."""
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; null does not clip."""
    schedule: Schedule = "constant"
    """Learning rate after the warm-up."""
    warmup: NonNegative = 0
    """Steps of linear warm-up from zero."""
    restarts: Positive = 1
    """Cycles of the `cosine-restarts` schedule."""
    power: NonNegativeFloat = 1.0
    """Exponent of the `polynomial` schedule."""
    final_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of a decaying schedule, as a share of the optimizer's."""
    log_every: Positive = 1
    """Steps between lines in log.jsonl."""
    save_every: Positive | None = None
    """Steps between checkpoints; null saves at the end only."""
    keep: Positive = 2
    """Newest checkpoints that are kept."""
    async_save: bool = False
    """Write checkpoints while the steps go on, from a copy in host memory (as much again as the state)."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What a loss or a gradient that is not finite does: end the run, or leave out the step and count it."""
    skip_limit: Positive | None = None
    """Steps in a row that may be left out; null is 10 with `skip`."""
    ema: EmaConfig | None = None
    """Keep a running average of the weights, such as `{decay: 0.999}`; null keeps none."""
    resume: Literal["none", "auto"] | InputPath = "none"
    """`auto`: go on from the newest complete checkpoint in the output folder, if any; or the path of one."""
    trackers: Any = ({"use": "tensorboard"},)
    """Where the run is shown besides log.jsonl and report.html, such as `[{use: wandb}]`; [] for nowhere."""
    export: Any = None
    """Format of the final weights in <output>/model; null leaves only checkpoints."""

    nested: ClassVar = {"export": "format"}
    listed: ClassVar = {"trackers": "tracker"}

    @model_validator(mode="after")
    def _stop_within(self) -> LoopConfig:
        if self.stop_at is not None and self.stop_at > self.steps:
            raise ValueError(f"stop_at {self.stop_at} is past steps {self.steps}; leave it out.")
        if self.warmup > self.steps:
            raise ValueError(f"warmup {self.warmup} is longer than steps {self.steps}; shorten it.")
        if self.skip_limit is not None and self.non_finite == "stop":
            raise ValueError("skip_limit has no meaning with non_finite: stop. Set skip, or leave it out.")
        return self

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield the trackers' problems, and those named twice."""
        names = [tracker.name for tracker in self.trackers]
        for number, tracker in enumerate(self.trackers):
            if tracker.name in names[:number]:
                yield Problem(f"trackers.{number}", f"{tracker.name!r} is named twice. Keep one.")
            for problem in tracker.config.check(spec):
                yield Problem(f"trackers.{number}.{problem.path}", problem.message)


class TrainConfig(LoopConfig):
    """Train a predictor, from its weights or from scratch, on the scheduler's target."""

    needs: ClassVar = (*MODELS, "dataset", "reader", "optimizer", "loader")
    optional: ClassVar = ("adapter",)
    trains: ClassVar = "predictor"
    from_features: ClassVar = True

    text_dropout: Probability = 0.1
    """Probability, per row, of training without its text."""
    image_dropout: Probability = 0.05
    """Probability, per row, of training without its image (image-to-video only)."""
    image_noise: tuple[float, float] | None = (-3.0, 0.5)
    """Mean and standard deviation of the log of the pixel noise on the image; null adds none."""
    memory: bool = False
    """Encode each row once and keep its latent moments and text in memory: for data sets of a few thousand
    clips.
    """
    export_whole: bool = False
    """Export text encoder, autoencoder and scheduler beside the predictor, as one pipeline folder."""
    validation: ValidationConfig | None = None
    """Losses on held-out rows and videos of fixed prompts, every so many steps; null validates nothing."""
    merge: bool = False
    """Export the predictor with the adapter's change worked in, in place of the adapter alone."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        yield from super().check(spec)
        if self.validation is not None:
            yield from self.validation.check(spec)
        if self.memory and spec.video.start == "random":
            yield Problem("memory", "keeps one latent per row, so video.start must be 'first' or 'center'.")
        if self.memory and spec.loader.buckets is not None:
            yield Problem("memory", "keeps one latent per row; buckets may give a row several. Remove one.")
        if self.memory and spec.card.image_latent != "none" and self.image_noise is not None:
            yield Problem("memory", "keeps encoded images, so image_noise must be null.")
        if "autoencoder" in getattr(spec.config("dataset"), "replaces", ()):
            yield from self._check_cached(spec)
        if self.export_whole and self.export is None:
            yield Problem(
                "export_whole", "has nothing to do without `export: {use: hf}`. Add it, or leave this out."
            )
        elif self.export_whole and not getattr(self.export.config, "holds_models", False):
            yield Problem(
                "export_whole", f"format {self.export.name!r} holds one part only. Use hf, or leave it out."
            )
        if self.merge and (self.export is None or "adapter" not in spec.choices):
            lacking = "no adapter" if "adapter" not in spec.choices else "no `export: {use: hf}`"
            yield Problem("merge", f"has nothing to do, for there is {lacking}. Leave it out.")
        elif self.export is not None and "adapter" in spec.choices and not self.merge:
            yield from _adapter_problems(self.export, self.export_whole, spec)
        else:
            yield from _export_problems(self.export, spec, "predictor")

    def _check_cached(self, spec: Spec) -> Iterable[Problem]:
        """Yield what has no effect, or cannot be, where rows are encoded already."""
        name = spec.name_of("dataset")
        if self.memory:
            yield Problem("memory", f"dataset {name!r} is encoded already. Set memory: false.")
        if spec.card.image_latent != "none" and self.image_noise is not None:
            yield Problem(
                "image_noise", f"is added to pixels, and dataset {name!r} has encoded images. Set it to null."
            )
        if self.export_whole:
            yield Problem("export_whole", f"dataset {name!r} leaves no encoders to export. Leave it out.")


class PrecomputeConfig(TaskConfig):
    """Encode every row once, into a cache of features in the output folder, for `dataset: feature-cache`."""

    needs: ClassVar = ("predictor", "text_encoder", "autoencoder", "dataset", "reader")
    unbuilt: ClassVar = ("predictor",)  # its card says what is encoded
    of_training: ClassVar = True

    rows: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] = "all"
    """Name of the list of rows; a folder can hold several, which share their items."""
    workers: NonNegative = 0
    """Threads that decode ahead of the encoders; 0 decodes in turn with them."""
    unreadable: Literal["error", "skip"] = "error"
    """After all else is encoded, rows that cannot be mean no list of rows, or one without them."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        if spec.video.start == "random":
            yield Problem("", "keeps one latent per row, so video.start must be 'first' or 'center'.")
        for choice in spec.parallel:
            if choice.name != "ddp":
                yield Problem(
                    "", f"ranks share the items by themselves, so {choice.name!r} has no effect. Use ddp."
                )


class SampleConfig(TaskConfig):
    """Sample videos from prompts, and from images for an image-to-video predictor."""

    needs: ClassVar = (*MODELS, "dataset", "reader")
    optional: ClassVar = ("adapters",)

    steps: Positive = 50
    """Sampling steps."""
    guidance: NonNegativeFloat = 6.0
    """Classifier-free guidance scale; 1 needs no unconditional prediction."""
    dynamic_guidance: bool = False
    """Let the guidance weight follow the timestep."""
    negative_prompt: str | None = None
    """What the unconditional prediction is conditioned on; null: the text encoder's unconditional embedding.
    """
    videos_per_prompt: Positive = 1
    """Videos per prompt, each with its own seed."""
    batch: Positive = 1
    """Videos sampled at a time."""
    initial_noise: InputPath | None = None
    """A safetensors file with one starting noise (C,T,h,w) per video, named by its number from 0."""
    save_latents: bool = False
    """Write NAME.safetensors with the final latent (C,T,h,w) beside each video."""
    formats: tuple[Literal["mp4", "gif", "png"], ...] = ("mp4",)
    """Files per video; png is a sheet of its frames."""
    sheet: bool = False
    """Write sheet.png, a contact sheet of every video; needs mp4 among the formats."""
    overwrite: bool = False
    """Replace videos that another recipe wrote to the same place."""

    @property
    def is_guided(self) -> bool:
        """Whether each step takes an unconditional prediction too."""
        return self.guidance != 1.0 or self.dynamic_guidance

    def check(self, spec: Spec) -> Iterable[Problem]:
        if self.sheet and "mp4" not in self.formats:
            yield Problem("sheet", "is made from the mp4 files; add mp4 to formats.")
        yield from _needs_weights(spec, "predictor", "samples noise")
        yield from _needs_weights(spec, "autoencoder", "decodes noise")


class EvaluateConfig(TaskConfig):
    """Measure the loss per timestep band and the autoencoder's reconstruction."""

    needs: ClassVar = (*MODELS, "dataset", "reader", "loader")
    optional: ClassVar = ("adapters",)

    bands: Annotated[int, Field(ge=1, le=1000)] = 10
    """Equal bands of timesteps."""
    draws: Positive = 1
    """Noise draws per row and band."""
    rows: Positive | None = None
    """Rows that are used; null uses all."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        yield from _needs_weights(spec, "predictor", "measures noise")
        yield from _needs_weights(spec, "autoencoder", "measures noise")


class TrainAutoencoderConfig(LoopConfig):
    """Train or fine-tune an autoencoder: reconstruction plus a weak pull of the latent to a unit Gaussian."""

    needs: ClassVar = ("autoencoder", "dataset", "reader", "optimizer", "loader")
    trains: ClassVar = "autoencoder"

    reconstruction: Literal["l1", "l2", "l1+l2"] = "l1"
    """Distance between the video and its reconstruction, a mean over pixels."""
    kl_weight: NonNegativeFloat = 1e-3
    """Weight of the KL divergence, a mean over latent elements."""
    measure_scale: bool = False
    """Export with the scale factor that gives the latents of these clips unit variance."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        yield from super().check(spec)
        if self.measure_scale and self.export is None:
            yield Problem("measure_scale", "has nothing to do without `export: {use: hf}`. Add it.")
        yield from _export_problems(self.export, spec, "autoencoder")


def _export_problems(export: Choice | None, spec: Spec, section: str) -> Iterable[Problem]:
    """Yield why a format cannot take the weights of a section's component."""
    if export is None or section not in spec.choices:
        return
    config, choice = export.config, spec.choices[section]
    if getattr(config, "read_only", False) or getattr(config, "holds", "") == "lora":
        what = "is read only" if getattr(config, "read_only", False) else "holds LoRA weights only"
        yield Problem("export", f"format {export.name!r} {what}. Use hf, sat, megatron or dcp.")
        return
    try:
        spec.registry.table(getattr(choice.config, "family", choice.name), export.component)
    except PluginError as error:
        yield Problem("export", str(error))
    plan = getattr(choice.config, "plan", None)
    if plan is not None and hasattr(config, "unfit") and (why := config.unfit(plan())):
        yield Problem("export", why)


def _adapter_problems(export: Choice, whole: bool, spec: Spec) -> Iterable[Problem]:
    """Yield why a format cannot take an adapter's weights alone."""
    if whole:
        yield Problem("export_whole", "only the adapter is exported. Add `merge: true`, or leave this out.")
    if getattr(export.config, "holds", "") != "lora":
        able = [c.name for c, _ in spec.registry.all("format") if getattr(c.config, "holds", "") == "lora"]
        yield Problem(
            "export",
            f"format {export.name!r} holds whole models, and beside an adapter only the adapter is exported. "
            f"Use {', '.join(able[:-1])} or {able[-1]}; or add `merge: true` for base and adapter in one.",
        )
        return
    predictor = spec.choices["predictor"]
    try:
        spec.registry.table(getattr(predictor.config, "family", predictor.name), export.component)
    except PluginError as error:
        yield Problem("export", str(error))


def _needs_weights(spec: Spec, section: str, verb: str) -> Iterable[Problem]:
    choice = spec.choices.get(section)
    if choice is not None and choice.weights is None:
        path = f"{section}: {{weights: {{use: hf, path: ...}}}}"
        yield Problem(
            "", f"{section} {choice.name!r} has no weights, so this {verb}. Add `{path}` or `model: PATH`."
        )


@hookimpl
def cvx_components() -> Iterable[Component]:
    yield Component(
        "task", "train", TrainConfig, "cvx_plugins.tasks.train:Train", summary="train a predictor"
    )
    yield Component(
        "task",
        "precompute",
        PrecomputeConfig,
        "cvx_plugins.tasks.precompute:Precompute",
        summary="encode every row once, into a cache of features",
    )
    yield Component(
        "task", "sample", SampleConfig, "cvx_plugins.tasks.sample:Sample", summary="sample videos"
    )
    yield Component(
        "task",
        "evaluate",
        EvaluateConfig,
        "cvx_plugins.tasks.evaluate:Evaluate",
        summary="loss per timestep band and reconstruction PSNR",
    )
    yield Component(
        "task",
        "train-autoencoder",
        TrainAutoencoderConfig,
        "cvx_plugins.tasks.train_autoencoder:TrainAutoencoder",
        summary="train or fine-tune an autoencoder",
    )
    yield from inspect_data.components()
