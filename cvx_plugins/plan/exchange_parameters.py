"""What parameters, their gradients and their updates take, on one rank in one step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch

from cvx_parallel.tensor import overlaps, shares
from cvx_plugins.plan.member import Member, Sent


def of_gradients(member: Member) -> Iterator[Sent]:
    """Yield what averaging takes where FSDP does not do it, and updates of rows if ranks have some each."""
    layout = member.layout
    names = [name for name in member.trained if not layout.is_sharded(name)]
    size = sum(member.count(name) for name in names) * member.wide
    if "zero2" in layout.strategies:  # as many rows for each rank
        each = _reduced_bytes(member, member.wide)
        shapes = (layout.unsharded(name, member.rank) for name in names)
        yield Sent("reduce_scatter", "loss", sum(padded(s, member.size("loss")) for s in shapes) * each)
    else:
        yield Sent("all_reduce", "loss", size)
    if member.slices:
        yield Sent("broadcast", "loss", size)


def of_shards(member: Member) -> Iterator[Sent]:
    """Yield what FSDP takes. Its shares are equal, so that a whole one is as long as all of them.

    Parameters are gathered for each forward and each backward pass, or once a batch where they are kept.
    """
    layout, ranks = member.layout, member.size("fsdp")
    count = {
        name: padded(layout.unsharded(name, member.rank), ranks)
        for name in member.names
        if layout.is_sharded(name)
    }
    passes = 2 * member.calls
    if member.splits_passes:
        passes = member.batches
    yield Sent("all_gather", "fsdp", passes * sum(count.values()) * member.each)
    trained = [name for name in member.trained if name in count]
    reduced = sum(count[name] for name in trained) * _reduced_bytes(member, member.each)
    yield Sent("reduce_scatter", "fsdp", reduced)
    if member.slices:
        yield Sent("all_reduce", "dp_replicate", reduced // ranks)
        yield Sent("broadcast", "dp_replicate", sum(layout.held(name, member.rank).bytes for name in trained))


def padded(shape: tuple[int, ...], ranks: int) -> int:
    """Return the elements of equal shares of dim 0, together."""
    return -(-shape[0] // ranks) * ranks * math.prod(shape[1:])


def _reduced_bytes(member: Member, usual: int) -> int:
    """Return the bytes of an element of gradients that are summed and shared out."""
    stated = [member.option(name, "reduce_dtype") for name in ("zero2", "zero3", "layerzero")]
    return next((getattr(torch, name).itemsize for name in stated if name is not None), usual)


def of_parts(member: Member) -> Iterator[Sent]:
    """Yield what tp takes for parameters: gradients that ranks have parts of, and rows of shared heads."""
    if member.size("tp") == 1:
        return
    layout = member.layout
    held = [layout.held(name, member.rank) for name in member.trained if _is_part(member, name)]
    yield Sent("all_reduce", "tp", sum(map(layout.gradient_bytes, held)))
    for name in member.names:
        if member.layout.is_tp(name) and member.is_inside_attention(name):
            yield Sent("all_to_all", "tp", _rows_moved(member, name))


def _is_part(member: Member, name: str) -> bool:
    """Tell whether ranks along tp have parts of a gradient: with a shared sequence all that tp leaves whole,
    else norms of queries and keys, and the factors of LoRA beside those that are shared out.
    """
    layout = member.layout
    if layout.is_tp(name) or member.shares_sequence:
        return not layout.is_tp(name)
    columns, rows = (
        any(_is_of(name, pattern) for pattern in patterns)
        for patterns in (layout.plan.column, layout.plan.row)
    )
    if (columns and name.endswith(".lora_A.weight")) or (rows and name.endswith(".lora_B.weight")):
        return True
    return member.is_inside_attention(name) and not rows


def _is_of(name: str, pattern: str) -> bool:
    """Tell whether a parameter belongs to a module whose name matches a pattern."""
    parts, length = name.split("."), pattern.count(".") + 1
    return len(parts) > length and fnmatchcase(".".join(parts[:length]), pattern)


def _rows_moved(member: Member, name: str) -> int:
    """Return the bytes of a layer's rows that lie on another rank than the head they belong to.

    They are handed over for each forward pass, back with gradients, and again where a block is recomputed.
    """
    layout, ranks, place = member.layout, member.size("tp"), member.place("tp")
    shape, dim = layout.shapes[name], layout.tp_dim(name)
    most = -(-shape[dim] // ranks)
    held = tuple(max(0, min(most, shape[dim] - rank * most)) for rank in range(ranks))
    heads = layout.plan.num_heads
    used = tuple(count * shape[dim] // heads for count in shares(heads, ranks))
    there, back = (
        sum(overlap for rank, overlap in enumerate(overlaps(place, *pair)) if rank != place)
        for pair in ((held, used), (used, held))
    )
    passes = 1 + (layout.unit(name) in member.recomputed)
    total = passes * there + (back if name in layout.trainable else 0)
    return member.calls * total * (math.prod(shape) // shape[dim]) * member.each
