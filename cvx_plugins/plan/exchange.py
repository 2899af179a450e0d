"""What a rank exchanges in one optimizer step: every collective, its axis, its bytes.

Left out: losses for the log, the norm of gradients, what encoder-dp gathers, and what is asked once in a run.
"""

from __future__ import annotations

from collections.abc import Mapping

from cvx_plugins.plan.exchange_activations import of_cp, of_pipeline, of_tp
from cvx_plugins.plan.exchange_encoding import of_chunks
from cvx_plugins.plan.exchange_parameters import of_gradients, of_parts, of_shards
from cvx_plugins.plan.member import Member, Sent
from cvx_plugins.plan.passes import Passes

FIGURE = {"loss": "data", "fsdp": "data", "dp_replicate": "data", "ring": "cp", "ulysses": "cp"}
"""{axis: what figures sum it up under}, where that is not the axis."""
FORMULAS = (of_gradients, of_shards, of_parts, of_tp, of_cp, of_pipeline, of_chunks)


def moved(passes: Passes, rank: int) -> Mapping[str, int]:
    """Return {data, tp, cp, pp, chunks: bytes} that a rank sends in a step."""
    member = Member(passes, rank)
    found: dict[str, float] = {}
    for item in exchanged(passes, rank):
        figure = FIGURE.get(item.axis, item.axis)
        found[figure] = found.get(figure, 0) + leaving(item, member.size(item.axis))
    return {figure: int(count) for figure, count in found.items()}


def leaving(item: Sent, ranks: int) -> float:
    """Return the bytes that leave a rank where collectives pass pieces round: 2 n (P-1)/P of an all-reduce of
    n bytes over P ranks, n (P-1)/P of the others; whatever a backend makes of it.
    """
    if item.kind in ("all_to_all", "send"):
        return item.size
    return (2 if item.kind == "all_reduce" else 1) * item.size * (ranks - 1) / ranks


def exchanged(passes: Passes, rank: int) -> list[Sent]:
    """Return all that a rank exchanges in a step, summed up by kind and axis."""
    member = Member(passes, rank)
    found: dict[tuple[str, str], int] = {}
    for formula in FORMULAS:
        for kind, axis, size in formula(member):
            if size and member.size(axis) > 1:
                found[kind, axis] = found.get((kind, axis), 0) + size
    return [Sent(kind, axis, size) for (kind, axis), size in found.items()]
