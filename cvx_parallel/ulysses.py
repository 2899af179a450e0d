"""Attention with heads shared out: ranks swap their tokens of all heads for all tokens of some heads.

Source: Jacobs et al. 2023 (arXiv 2309.14509), section 3. Any number of heads: ranks have equally many or one
fewer, and those without any only hand over. Text is on every rank already; its outputs are gathered.

Per call and rank, forward and again backward: all-to-all of 4 B N S K / P elements of video, of which a rank
keeps 1/P; text: an all-gather of B N L K / P (backward: a reduce-scatter).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cvx_parallel.collectives import Group, exchanged, rank_in, size_of
from cvx_parallel.pieces import gather, shares
from cvx_parallel.tokens import Lengths, check

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
HEADS, TOKENS = -3, -2


class Ulysses:
    """An `attend` slot over a group of ranks. inner: what attends to all tokens, with some of the heads;
    where: the module whose slot it is, for messages.
    """

    def __init__(
        self,
        group: Group,
        lengths: Callable[[], Lengths],
        inner: Attend,
        where: str = "attention",
    ):
        self._group, self._lengths, self._inner, self._where = group, lengths, inner, where
        self._rank, self._world = rank_in(group), size_of(group)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B,N,L+s,K) for q, k, v (B,N,L+s,K): the text, then this rank's video.

        Raises CvxError for a mask.
        """
        text, video = self._lengths()
        check(q, mask, text + video[self._rank], self._where)
        heads = shares(q.shape[1], self._world)
        out = self._attend(torch.stack((q, k, v)), text, video, heads)
        if text == 0:
            return _swapped(out, TOKENS, video, HEADS, heads, self._group)
        words = _GatherHeads.apply(out[:, :, :text], heads, self._group)
        return torch.cat((words, _swapped(out[:, :, text:], TOKENS, video, HEADS, heads, self._group)), dim=2)

    def _attend(self, qkv: Tensor, text: int, video: Sequence[int], heads: Sequence[int]) -> Tensor:
        """Return what this rank's heads (B,n,L+S,K) make of all tokens, for qkv (3,B,N,L+s,K)."""
        words = qkv[..., :text, :].split(list(heads), HEADS)[self._rank]
        pixels = _swapped(qkv[..., text:, :], HEADS, heads, TOKENS, video, self._group)
        q, k, v = torch.cat((words, pixels), TOKENS).unbind()
        if heads[self._rank] == 0:
            return q  # empty, and still part of the graph: the backward pass has to hand over as well
        return self._inner(q, k, v, None)


def swap(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: Group) -> tuple[Tensor, ...]:
    """Send part i to rank i of a group and return what each sent here, of these shapes. One all-to-all."""
    sent = torch.cat([part.reshape(-1) for part in parts])
    sizes = [torch.Size(shape).numel() for shape in shapes]
    pieces = exchanged(sent, sizes, [part.numel() for part in parts], group).split(sizes)
    return tuple(piece.view(*shape) for piece, shape in zip(pieces, shapes, strict=True))


def _swapped(
    x: Tensor, cut: int, cuts: Sequence[int], join: int, joins: Sequence[int], group: Group
) -> Tensor:
    """Cut x along one dim, hand each rank its piece, and join what comes back along the other.

    cuts: sizes of the pieces along dim `cut`; joins: every rank's size along dim `join`. Dims are negative.
    """
    return _Swap.apply(x, cut, tuple(cuts), join, tuple(joins), group)


class _Swap(Function):
    """Its adjoint is the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cut: int,
        cuts: tuple[int, ...],
        join: int,
        joins: tuple[int, ...],
        group: Group,
    ) -> Tensor:
        ctx.way_back = (join, joins, cut, cuts, group)
        shapes = []
        for size in joins:
            shape = list(x.shape)
            shape[cut], shape[join] = cuts[rank_in(group)], size
            shapes.append(shape)
        return torch.cat(swap(x.split(cuts, cut), shapes, group), join)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (_Swap.apply(grad, *ctx.way_back), *[None] * 5)


class _GatherHeads(Function):
    """All-gather along dim 1. Ranks go on with text of their own, so their gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], group: Group) -> Tensor:
        ctx.shape, ctx.sizes, ctx.group = x.shape, sizes, group
        return torch.cat(gather(x, 1, sizes, group), dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        pieces = swap(grad.split(ctx.sizes, dim=1), [ctx.shape] * len(ctx.sizes), ctx.group)
        return torch.stack(pieces).sum(0), None, None
