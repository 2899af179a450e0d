"""Bytes that a rank sends in one optimizer step, along each axis.

An all-reduce of n bytes over P ranks is counted as 2 n (P-1)/P, an all-gather or reduce-scatter to or from n
bytes as n (P-1)/P, whatever the backend makes of it. What is left out is small: losses, norms, encoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cvx_parallel.tensor import shares
from cvx_plugins.plan.layout import Layout
from cvx_plugins.plan.passes import Passes


@dataclass(frozen=True)
class Weights:
    """Bytes of a stage's parameters before FSDP cuts them. units: of each block, the rest last.

    gathered: those that FSDP shares out, in the precision of the computation; trained: gradients of all that
    is trained, ignored: of those among them that FSDP leaves alone; replicated: of what tp leaves whole.
    """

    units: tuple[int, ...]
    gathered: int
    trained: int
    ignored: int
    replicated: int
    trained_units: tuple[int, ...]


def moved(passes: Passes, place: int, weights: Weights, rows: int, microbatches: int) -> Mapping[str, int]:
    """Return {axis: bytes} that the first rank of a place along pp sends; rows: of a microbatch."""
    layout = passes.layout
    batches = layout.spec.config("task").accumulate
    found = {
        "data": _data(layout, weights, batches, microbatches),
        **_inside(passes, place, rows, batches * microbatches),
    }
    if layout.size("pp") > 1:
        found["pp"] = _pipeline(passes, place, rows) * batches * microbatches
    if getattr(layout.strategies.get("tp"), "sequence", False):
        found["tp"] += _reduced(weights.replicated, layout.size("tp"))
    return {axis: int(count) for axis, count in found.items() if count}


def _reduced(count: float, ranks: int) -> float:
    """Return what an all-reduce of so many bytes takes."""
    return 2 * _gathered(count, ranks)


def _gathered(count: float, ranks: int) -> float:
    """Return what an all-gather to so many bytes takes, or a reduce-scatter from them."""
    return count * (ranks - 1) / ranks


def _data(layout: Layout, weights: Weights, batches: int, microbatches: int) -> float:
    uses, ranks = layout.strategies, layout.size("fsdp")
    if not any(use in uses for use in ("zero2", "zero3", "layerzero")):
        whole = _reduced(weights.trained, layout.size("loss"))
        return whole + (_gathered(weights.trained, layout.size("loss")) if "zero1" in uses else 0)
    shared = weights.trained - weights.ignored
    times = 1 if "zero2" in uses or _is_split(layout) else 2 * batches * microbatches
    total = times * _gathered(weights.gathered, ranks) + _gathered(shared, ranks)
    if "layerzero" in uses:
        replicas, loss = layout.size("dp_replicate"), layout.size("loss")
        total += _reduced(shared / ranks, replicas) + _gathered(shared / ranks, replicas)
        total += _reduced(weights.ignored, loss) + _gathered(weights.ignored, loss)
    return total


def _is_split(layout: Layout) -> bool:
    """Tell whether backward passes are split, so that parameters stay gathered for a whole step."""
    return getattr(layout.strategies.get("pp"), "schedule", "") == "zero-bubble"


def _inside(passes: Passes, place: int, rows: int, times: int) -> dict[str, float]:
    """Return what blocks exchange along tp and cp, and what `join` does."""
    layout = passes.layout
    blocks = sum(len(layout.stages[stage]) for stage in layout.stages_of(place))
    recompute = layout.strategies.get("recompute")
    again = -(-blocks // recompute.every) if recompute is not None else 0
    forward, backward = (blocks + again) * times, blocks * times
    is_last = len(layout.stages) - 1 in layout.stages_of(place)
    found: dict[str, float] = {}
    if layout.size("tp") > 1:
        found["tp"] = (forward + backward) * _tp(passes, rows)
        if getattr(layout.strategies["tp"], "sequence", False) and is_last:
            found["tp"] += times * _gathered(_video_bytes(passes, rows), layout.size("tp"))
    if layout.size("cp") > 1:
        ulysses, ring_forward, ring_backward = _cp(passes, rows)
        found["cp"] = (forward + backward) * ulysses + forward * ring_forward + backward * ring_backward
        if is_last:
            found["cp"] += times * _gathered(_all_video_bytes(passes, rows), layout.size("cp"))
    return found


def _width(passes: Passes) -> int:
    return int(passes.outline.video.shape[2])


def _text(passes: Passes) -> int:
    return int(passes.outline.text.shape[1])


def _video_bytes(passes: Passes, rows: int) -> int:
    """Return the bytes of the video tokens of a rank's share along cp."""
    return rows * passes.standing.video * _width(passes) * passes.dtype.itemsize


def _all_video_bytes(passes: Passes, rows: int) -> int:
    return rows * int(passes.outline.video.shape[1]) * _width(passes) * passes.dtype.itemsize


def _tp(passes: Passes, rows: int) -> float:
    """Return what one block takes along tp in one direction: an exchange around each pair of layers.

    With a shared sequence, video takes as much, in an all-gather and a reduce-scatter.
    """
    layout = passes.layout
    text = rows * _text(passes) * _width(passes) * passes.dtype.itemsize
    return 2 * _reduced(_video_bytes(passes, rows) + text, layout.size("tp"))


def _cp(passes: Passes, rows: int) -> tuple[float, float, float]:
    """Return what one block takes along cp: ulysses in one direction, a ring forward, and backward."""
    layout, each = passes.layout, passes.dtype.itemsize
    ulysses, ring = layout.size("ulysses"), layout.size("ring")
    head_width = _width(passes) / layout.plan.num_heads
    heads = shares(layout.plan.num_heads, layout.size("tp"))[0]
    line = rows * heads * head_width  # elements per token
    swapped = 4 * line * passes.standing.video + line * _text(passes)
    few = shares(heads, ulysses)[0] * rows * head_width
    block = 2 * few * passes.standing.video * ulysses
    gradients = block * max(4, each)
    ring_backward = (ring - 1) * block * each + ring * gradients if ring > 1 else 0
    return _gathered(swapped * each, ulysses), (ring - 1) * block * each, ring_backward


def _pipeline(passes: Passes, place: int, rows: int) -> float:
    """Return what a rank's stages send for one microbatch: tokens on, and gradients back."""
    layout = passes.layout
    tokens = rows * (passes.standing.shared + _text(passes)) * _width(passes)
    each = (tokens + rows * int(passes.outline.temb.shape[1])) * passes.dtype.itemsize
    stages = layout.stages_of(place)
    on, back = sum(s < len(layout.stages) - 1 for s in stages), sum(s > 0 for s in stages)
    return each * (on + back)
