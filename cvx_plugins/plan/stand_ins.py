"""Strategies as far as a rank's memory goes: shapes are those of the first rank, and nobody else is asked.

They fill the same slots as the strategies do, on a predictor on the meta device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from cvx_core.interfaces import Plan, Tokens
from cvx_parallel.tensor import matching, shares
from cvx_plugins.plan.live import attend


class Exchanged(Function):
    """A collective: a tensor of another shape comes out, and one of the old shape comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.shape = x.shape
        return _through_buffer(x, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _through_buffer(grad, ctx.shape), None


def _through_buffer(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return what is put together from pieces: for a moment there is a buffer of them, and what was sent."""
    buffer = x.new_empty(max(x.numel(), math.prod(shape)))
    sent = x.new_empty(min(x.numel(), math.prod(shape)))
    out = x.new_empty(shape)
    del buffer, sent
    return out


def exchanged(x: Tensor, dim: int, size: int) -> Tensor:
    """Return what a collective makes of x: of another size along a dim."""
    shape = list(x.shape)
    shape[dim] = size
    result: Tensor = Exchanged.apply(x, tuple(shape))
    return result


class Standing:
    """Slots and layers of the first rank. video: all tokens of the video; text: those of the text."""

    def __init__(
        self, predictor: Any, plan: Plan, video: int, text: int, sizes: dict[str, int], sequence: bool
    ):
        self._predictor, self._plan, self._text, self._sizes = predictor, plan, text, sizes
        self._runs = shares(video, sizes["ring"] * sizes["ulysses"])
        self._whole, self._mine = video, self._runs[0]
        self._shared = shares(self._mine, sizes["tp"])[0] if sequence else self._mine
        self._fill()

    @property
    def video(self) -> int:
        """Tokens of the video that this rank has of those that cp shares out."""
        return self._mine

    @property
    def shared(self) -> int:
        """Tokens of the video between a block's layers, where tp may share them out too."""
        return self._shared

    def _fill(self) -> None:
        predictor = self._predictor
        for module in matching(predictor, self._plan.attend).values():
            module.attend = self._ulysses if self._sizes["ulysses"] > 1 else attend
        if self._shared != self._whole:
            predictor.split, predictor.join = self._split, self._join
        if self._sizes["tp"] > 1:
            self._share_layers()

    def _split(self, tokens: Tokens) -> Tokens:
        rope = tokens.rope
        if rope is not None:
            rope = (rope[0][: self._mine], rope[1][: self._mine])
        return tokens._replace(video=tokens.video[:, : self._shared], rope=rope)

    def _join(self, tokens: Tokens) -> Tokens:
        return tokens._replace(video=exchanged(tokens.video, 1, self._whole))

    def _ulysses(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        ranks, text, heads = self._sizes["ulysses"], self._text, q.shape[1]
        few, seen = shares(heads, ranks)[0], sum(self._runs[:ranks])
        qkv = torch.stack((q, k, v))
        words = qkv[..., :text, :][:, :, :few]
        pixels = Exchanged.apply(qkv[..., text:, :], (3, len(q), few, seen, q.shape[3]))
        q, k, v = torch.cat((words, pixels), -2).unbind()
        out = attend(q, k, v)
        words = exchanged(out[:, :, :text], 1, heads)
        shape = (len(q), heads, self._mine, q.shape[3])
        return torch.cat((words, Exchanged.apply(out[:, :, text:], shape)), 2)

    def _share_layers(self) -> None:
        predictor, plan = self._predictor, self._plan
        around = matching(predictor, plan.attend)
        for attention in around.values():
            attention.register_forward_pre_hook(lambda _, args: (self._enter(args[0]), *args[1:]))
        for name, layer in matching(predictor, plan.column).items():
            inside = any(name.startswith(f"{outer}.") for outer in around)
            width = self._width(layer.out_features, inside)
            narrow(layer, {"weight": 0, "bias": 0}, width)
            if hasattr(layer, "lora_B"):
                narrow(layer.lora_B, {"weight": 0}, width)
            if not inside:
                layer.register_forward_pre_hook(lambda _, args: (self._enter(args[0]),))
        for name, layer in matching(predictor, plan.row).items():
            inside = any(name.startswith(f"{outer}.") for outer in around)
            width = self._width(layer.in_features, inside)
            narrow(layer, {"weight": 1}, width)
            if hasattr(layer, "lora_A"):
                narrow(layer.lora_A, {"weight": 1}, width)
            layer.forward = _Row(layer, self)

    def _width(self, count: int, inside: bool) -> int:
        """Return how much of a layer the first rank computes with: whole heads inside attention."""
        if not inside:
            return -(-count // self._sizes["tp"])
        return shares(self._plan.num_heads, self._sizes["tp"])[0] * count // self._plan.num_heads

    def _enter(self, x: Tensor) -> Tensor:
        return x if self._shared == self._mine else exchanged(x, 1, self._text + self._mine)

    def leave(self, x: Tensor) -> Tensor:
        """Return what a row layer's sum over ranks leaves here."""
        return exchanged(x, 1, self._text + self._shared)


class _Row:
    """`forward` of a row layer: its bias is added once the ranks' outputs are summed."""

    def __init__(self, layer: Any, standing: Standing):
        self._layer, self._standing = layer, standing

    def __call__(self, x: Tensor) -> Tensor:
        layer = self._layer
        out = F.linear(x, layer.weight)
        if hasattr(layer, "beside"):
            out = out + layer.beside(x, layer.lora_A.weight, layer.lora_B.weight)
        out = self._standing.leave(out)
        return out + layer.bias if layer.bias is not None else out


def narrow(layer: Any, dims: dict[str, int], size: int) -> None:
    """Leave `size` of a layer's parameters along some dims."""
    for name, dim in dims.items():
        if (param := getattr(layer, name)) is not None:
            setattr(layer, name, nn.Parameter(param.narrow(dim, 0, size).clone(), param.requires_grad))
