"""Changes to a recipe that take memory off its ranks, planned in turn and ranked by what a row then costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

from cvx_core.errors import CvxError
from cvx_core.spec import Spec, resolve
from cvx_plugins.plan.figures import Planned, planned
from cvx_plugins.plan.passes import Sample

Data = dict[str, Any]
Edit = Callable[[Data], None]
SIZES = (2, 4, 8)
ROUNDS = 3
"""Changes that are tried together at most."""
OPERATIONS_PER_BYTE = 10_000
"""What sending a byte counts for where no device is stated: 4e14 operations to 4e10 bytes a second."""
DATA_AXIS = ("ddp", "zero1", "zero2", "zero3", "layerzero")


@dataclass(frozen=True)
class Change:
    """names: what is changed, together; cost: device time of a row against that of the recipe."""

    names: tuple[str, ...]
    peak: int
    fits: bool
    cost: float
    rows: int
    trains_less: bool

    def plain(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return asdict(self)


@dataclass(frozen=True)
class _Tried:
    change: Change
    spec: Spec


def changes(spec: Spec, before: Planned) -> list[Change]:
    """Return changes that were tried: those that fit first, the cheapest first among them.

    Single ones, and where none of them fits, the one that takes off most with each of the others, and so on.
    """
    sample = Sample(spec)
    tried: list[Change] = []
    names: tuple[str, ...] = ()
    for _ in range(ROUNDS):
        found = [_try(spec, names, name, edit, before, sample) for name, edit in edits(spec)]
        usable = [one for one in found if one is not None]
        tried += [one.change for one in usable]
        if any(one.change.fits for one in usable) or not usable:
            break
        best = min(usable, key=lambda one: (one.change.trains_less, one.change.peak))
        names, spec = best.change.names, best.spec
    return sorted(tried, key=lambda one: (not one.fits, one.trains_less, one.cost if one.fits else one.peak))


def _try(
    spec: Spec, names: tuple[str, ...], name: str, edit: Edit, before: Planned, sample: Sample
) -> _Tried | None:
    """Return what a change comes to; None where the recipe does not take it."""
    data = deepcopy(spec.recipe.data)
    for item in data.get("parallel") or []:
        if item["use"] in DATA_AXIS:
            item.pop("size", None)  # the data axis takes what is left
    edit(data)
    try:
        changed = resolve(replace(spec.recipe, data=data), spec.registry)
        result = planned(changed, sample)
    except CvxError:
        return None
    fits = result.peak <= spec.config("task").memory_gb * 1e9
    ratio = round(cost(result) / cost(before), 3)
    less = "adapter" in data and "adapter" not in before.sections
    return _Tried(Change((*names, name), result.peak, fits, ratio, result.rows, less), changed)


def cost(result: Planned) -> float:
    """Return what a row takes: time of a step, or operations where no device is stated."""
    if result.seconds is not None:
        return result.seconds["step"] / result.rows
    sent = max(sum(stage.exchange.values()) for stage in result.stages)
    return (max(stage.flops for stage in result.stages) + OPERATIONS_PER_BYTE * sent) / result.rows


def edits(spec: Spec) -> Iterator[tuple[str, Edit]]:
    """Yield changes that a recipe leaves room for, by name."""
    uses = {choice.name: choice.config for choice in spec.parallel}
    recompute = uses.get("recompute")
    if recompute is None:
        yield "recompute selective", _adds({"use": "recompute", "mode": "selective"})
    if recompute is None or recompute.mode != "full" or recompute.every > 1:
        yield "recompute", _instead(("recompute",), {"use": "recompute"})
    if recompute is None or not recompute.offload:
        yield "recompute offload", _instead(("recompute",), {"use": "recompute", "offload": True})
    for data in ("zero2", "zero3"):
        if data not in uses and not {"zero3", "layerzero"} & set(uses):
            yield data, _instead(DATA_AXIS, {"use": data})
    for size in SIZES:
        if "cp" not in uses:
            yield f"cp ulysses {size}", _adds({"use": "cp", "ulysses": size})
        if "tp" not in uses:
            yield f"tp {size} sequence", _adds({"use": "tp", "size": size, "sequence": True})
        if "pp" not in uses and spec.loader.batch >= size:
            yield f"pp {size}", _adds({"use": "pp", "size": size})
    if "interleave" not in uses and {"text_encoder", "autoencoder"} & set(spec.choices) - spec.unbuilt:
        yield "interleave", _adds({"use": "interleave"})
    if "adapter" not in spec.choices:
        yield "lora", lambda data: data.update(adapter={"use": "lora"})


def _adds(item: Data) -> Edit:
    return _instead((), item)


def _instead(names: tuple[str, ...], item: Data) -> Edit:
    def edit(data: Data) -> None:
        data["parallel"] = [one for one in data.get("parallel") or [] if one["use"] not in names] + [item]

    return edit
