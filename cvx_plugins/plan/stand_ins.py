"""Strategies as far as a rank's memory goes: those of the first rank, on groups of which no other is there.

They fill the same slots as the strategies do, on a predictor on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cvx_core.interfaces import Plan
from cvx_parallel.collectives import FirstOf
from cvx_parallel.tensor import (
    Exchange,
    Replicated,
    Shared,
    enter_once,
    is_inside,
    matching,
    share_sequence,
    shares,
)
from cvx_parallel.tokens import Context, share_tokens
from cvx_parallel.ulysses import Attend, Ulysses
from cvx_plugins.plan.live import attend


def stand_in(predictor: Any, plan: Plan, groups: Mapping[str, FirstOf], sequence: bool) -> None:
    """Fill a predictor's slots, and leave the first rank's part of its layers. groups: by axis."""
    if groups["tp"].size > 1:
        shared = Shared(groups["tp"]) if sequence else None
        _share_layers(predictor, plan, shared or Replicated(groups["tp"]), groups["tp"].size)
        if shared is not None:
            share_sequence(predictor, shared)
    context = Context(groups["cp"], groups["ring"].size, groups["ulysses"].size)
    if groups["cp"].size > 1:
        share_tokens(predictor, context)
    slot: Attend = attend
    if groups["ulysses"].size > 1:
        slot = Ulysses(groups["ulysses"], context.of_ulysses, attend)
    for module in matching(predictor, plan.attend).values():
        module.attend = slot


def _share_layers(predictor: Any, plan: Plan, exchange: Exchange, ranks: int) -> None:
    around = matching(predictor, plan.attend)
    for attention in around.values():
        enter_once(attention, exchange)
    for name, layer in matching(predictor, plan.column).items():
        inside = is_inside(name, around)
        width = _width(layer.out_features, plan.num_heads if inside else None, ranks)
        narrow(layer, {"weight": 0, "bias": 0}, width)
        if hasattr(layer, "lora_B"):
            narrow(layer.lora_B, {"weight": 0}, width)
        if not inside:
            enter_once(layer, exchange)
    for name, layer in matching(predictor, plan.row).items():
        width = _width(layer.in_features, plan.num_heads if is_inside(name, around) else None, ranks)
        narrow(layer, {"weight": 1}, width)
        if hasattr(layer, "lora_A"):
            narrow(layer.lora_A, {"weight": 1}, width)
        layer.forward = _Row(layer, exchange)


def _width(count: int, heads: int | None, ranks: int) -> int:
    """Return how much of a layer the first rank computes with: whole heads inside attention."""
    return -(-count // ranks) if heads is None else shares(heads, ranks)[0] * count // heads


class _Row:
    """`forward` of a row layer: its bias is added once the ranks' outputs are summed."""

    def __init__(self, layer: Any, exchange: Exchange):
        self._layer, self._exchange = layer, exchange

    def __call__(self, x: Tensor) -> Tensor:
        layer = self._layer
        out = F.linear(x, layer.weight)
        if hasattr(layer, "beside"):
            out = out + layer.beside(x, layer.lora_A.weight, layer.lora_B.weight)
        out = self._exchange.leave(out)
        return out + layer.bias if layer.bias is not None else out


def narrow(layer: Any, dims: dict[str, int], size: int) -> None:
    """Leave `size` of a layer's parameters along some dims."""
    for name, dim in dims.items():
        if (param := getattr(layer, name)) is not None:
            setattr(layer, name, nn.Parameter(param.narrow(dim, 0, size).clone(), param.requires_grad))
