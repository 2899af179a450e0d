"""All figures of a planned run: memory by stage, exchange by axis, time. Plain values, as in plan.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cvx_core.spec import Spec
from cvx_parallel.gradients import BUCKET
from cvx_parallel.pipeline import actions
from cvx_plugins.plan.exchange import moved
from cvx_plugins.plan.in_flight import in_flight
from cvx_plugins.plan.layout import KNOWN, Layout
from cvx_plugins.plan.passes import Passes, Sample


@dataclass(frozen=True)
class Figures:
    """Of the fullest rank of a place along pp, bytes. peak: at most, in training or while rows are encoded.

    parameters, gradients, optimizer, average: what the rank keeps; gathered: what is put together for a
    while, at most; activations: at most, those of microbatches that wait included; encoders: parameters of
    both; encoding: what encoding one row takes; exchange: {axis: bytes sent in a step}; flops: of a step.
    """

    place: int
    rank: int
    blocks: int
    parameters: int
    gradients: int
    optimizer: int
    average: int
    gathered: int
    activations: int
    encoders: int
    encoding: int
    peak: int
    exchange: Mapping[str, int]
    flops: int


@dataclass(frozen=True)
class Weights:
    """Bytes of a stage's parameters before FSDP cuts them. units: of each block, the rest last.

    gathered: those that FSDP shares out, in the precision of the computation; trained: gradients of all that
    is trained, largest: of one of them, ignored: of those among them that FSDP leaves alone.
    """

    units: tuple[int, ...]
    gathered: int
    trained: int
    largest: int
    ignored: int
    trained_units: tuple[int, ...]


@dataclass(frozen=True)
class Planned:
    """A recipe's figures. rows: of a step, over all ranks; seconds: of a step and what it consists of."""

    sections: tuple[str, ...]
    mesh: str
    rows: int
    stages: tuple[Figures, ...]
    seconds: Mapping[str, float] | None
    notes: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Bytes of the rank that needs most."""
        return max(stage.peak for stage in self.stages)


def planned(spec: Spec, sample: Sample | None = None) -> Planned:
    """Return the figures of a recipe whose task is `plan`. sample: of a recipe that encodes the same."""
    layout = Layout(spec)
    sample = sample or Sample(spec)
    passes = Passes(layout, sample)
    stages = tuple(_stage(passes, sample, place) for place in range(layout.size("pp")))
    config = spec.config("task")
    rows = spec.loader.batch * config.accumulate * layout.size("batch")
    seconds = _seconds(passes, sample, stages) if config.flops is not None else None
    return Planned(tuple(spec.choices), str(layout.degrees), rows, stages, seconds, _notes(spec))


def _notes(spec: Spec) -> tuple[str, ...]:
    """Return what is not in the figures."""
    unknown = [choice.name for choice in spec.parallel if choice.name not in KNOWN]
    notes = [f"{name}: not known here; the figures are those without it" for name in unknown]
    if any(choice.name == "compile" for choice in spec.parallel):
        notes.append("compile: fused kernels keep fewer activations than stated here")
    return tuple(notes)


def _stage(passes: Passes, sample: Sample, place: int) -> Figures:
    layout = passes.layout
    rank, weights = layout.first_of(place), weights_of(passes, place)
    parameters, gradients, optimizer = layout.state_bytes(rank)
    microbatches, rows = divided(layout)
    batches = microbatches * layout.spec.config("task").accumulate
    gathered = _gathered(layout, weights, batches)
    activations, flops = _activations(passes, place, microbatches, rows)
    interleave = layout.strategies.get("interleave")
    stays = not (interleave is not None and interleave.offload)
    average = layout.average_bytes(rank) if layout.spec.config("task").ema else 0
    kept = parameters + optimizer + average
    training = kept + gradients + gathered + activations + (sample.encoder_bytes if stays else 0)
    return Figures(
        place=place,
        rank=rank,
        blocks=sum(len(layout.stages[stage]) for stage in layout.stages_of(place)),
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        average=average,
        gathered=gathered,
        activations=activations,
        encoders=sample.encoder_bytes,
        encoding=sample.encoding.peak,
        peak=max(training, kept + sample.encoder_bytes + sample.encoding.peak),
        exchange=moved(passes, rank),
        flops=flops * layout.spec.config("task").accumulate,
    )


def divided(layout: Layout) -> tuple[int, int]:
    """Return the microbatches of a batch, and the rows of the largest."""
    batch = layout.spec.loader.batch
    count = layout.strategies["pp"].parts(batch) if layout.size("pp") > 1 else 1
    return count, math.ceil(batch / count)


def weights_of(passes: Passes, place: int) -> Weights:
    """Return the bytes of a stage's parameters before FSDP cuts them."""
    layout, rank = passes.layout, passes.layout.first_of(place)
    names = layout.names(place)
    wide, each = layout.dtype.itemsize, passes.dtype.itemsize
    count = {name: math.prod(layout.unsharded(name, rank)) for name in names}
    shared = [name for name in names if layout.is_sharded(name)]
    trained = [name for name in names if name in layout.trainable]
    units: dict[str, int] = {}
    trained_units: dict[str, int] = {}
    for name in shared:
        unit = layout.unit(name)
        units[unit] = units.get(unit, 0) + count[name] * each
        trained_units[unit] = trained_units.get(unit, 0) + count[name] * each * (name in layout.trainable)
    return Weights(
        units=tuple(units.values()),
        gathered=sum(units.values()),
        trained=sum(count[name] for name in trained) * wide,
        largest=max((count[name] for name in trained), default=0) * wide,
        ignored=sum(count[name] for name in trained if not layout.is_sharded(name)) * wide,
        trained_units=tuple(trained_units.values()),
    )


def _gathered(layout: Layout, weights: Weights, batches: int) -> int:
    """Return what is held besides a rank's own share: units as a whole, and gradients before they are cut.

    A unit that is gathered takes its memory twice for a moment, and so does a gradient that is cut up.
    """
    if "zero2" in layout.strategies and layout.size("loss") > 1:
        return _scattered(weights, batches)
    if not weights.units or layout.size("fsdp") == 1:
        return 0
    largest = max(weights.units)
    if getattr(layout.strategies.get("pp"), "schedule", "") == "zero-bubble":
        parameters = weights.gathered + largest
    else:
        config = layout.strategies.get("zero3") or layout.strategies.get("layerzero")
        ahead = _ahead(config)
        parameters = min(weights.gathered, (1 + ahead) * largest) + largest
    gradients = 2 * max(weights.trained_units)
    if batches > 1:  # until the last batch, gradients are added up whole
        gradients = weights.trained - weights.ignored + max(weights.trained_units)
    return parameters + gradients


def _ahead(config: Any) -> int:
    """Return how many blocks zero3 or layerzero gathers while one is computed, in either pass."""
    if hasattr(config, "backward_prefetch"):
        return int(config.forward_prefetch or config.backward_prefetch == "BACKWARD_PRE")
    return int(config.prefetch)


def _scattered(weights: Weights, batches: int) -> int:
    """Return what zero2 holds of gradients besides a rank's rows: a bucket that is filled and two on their
    way, and all of them whole until the last batch.
    """
    bucket = min(weights.trained, BUCKET + weights.largest)
    return 3 * bucket + (weights.trained if batches > 1 else 0)


def _activations(passes: Passes, place: int, microbatches: int, rows: int) -> tuple[int, int]:
    """Return a rank's activations at most, and the operations of one batch."""
    layout = passes.layout
    last = len(layout.stages) - 1
    by_stage = {
        stage: passes.of(len(layout.stages[stage]), stage == 0, stage == last, rows)
        for stage in layout.stages_of(place)
    }
    flops = sum(one.flops for one in by_stage.values()) * microbatches
    if layout.size("pp") == 1:
        return passes.tables + by_stage[0].peak, flops
    schedule = layout.strategies["pp"].schedule
    order = actions(schedule, layout.size("pp"), len(layout.stages), microbatches)[place]
    return passes.tables + in_flight(order, by_stage), flops


def _seconds(passes: Passes, sample: Sample, stages: tuple[Figures, ...]) -> Mapping[str, float]:
    """Return the time of a step: computing and exchange along tp, cp and pp, the pipeline's gaps in both,
    and what is left of the data axis' exchange once it has run beside that.
    """
    layout, config = passes.layout, passes.layout.spec.config("task")
    bandwidth = config.bandwidth_gb * 1e9
    computing = max(stage.flops for stage in stages) / (config.flops * 1e12)
    inside = max(sum(s.exchange.get(axis, 0) for axis in ("tp", "cp", "pp")) for s in stages) / bandwidth
    microbatches, _ = divided(layout)
    virtual = len(layout.stages) / layout.size("pp")
    gaps = (layout.size("pp") - 1) / virtual / microbatches * (computing + inside)
    data = max(stage.exchange.get("data", 0) for stage in stages) / bandwidth
    encoding = sample.encoding.flops * layout.spec.loader.batch * config.accumulate / (config.flops * 1e12)
    names = {"encoder-dp", "vae-cp"} & set(layout.strategies)
    encoding /= layout.size("model") if names else 1
    encoding += max(stage.exchange.get("chunks", 0) for stage in stages) / bandwidth
    parts = {
        "computing": computing,
        "exchange": inside,
        "gaps": gaps,
        "data_left": max(0.0, data - computing),
        "encoding": encoding,
    }
    return {"step": sum(parts.values()), **parts}


def plain(result: Planned) -> dict[str, Any]:
    """Return figures as JSON takes them."""
    from dataclasses import asdict

    return {"peak": result.peak, **asdict(result)}
