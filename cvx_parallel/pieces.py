"""A tensor in pieces on several ranks, cut along one dim: how long they are, and how they come together.

Pieces differ by one in length at most, so that any number of things goes over any number of ranks; shorter
ones travel padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cvx_parallel.collectives import Group, gathered, rank_in

Sizes = tuple[int, ...]


def shares(count: int, world: int) -> Sizes:
    """Return how many of `count` things each rank has; the first ranks have one more where needed."""
    return tuple(count // world + (rank < count % world) for rank in range(world))


def padded(x: Tensor, dim: int, size: int) -> Tensor:
    """Return x with zeros behind it up to a size along a dim."""
    if x.shape[dim] == size:
        return x
    zeros = x.new_zeros(*x.shape[:dim], size - x.shape[dim], *x.shape[dim + 1 :])
    return torch.cat((x, zeros), dim)


def gather(x: Tensor, dim: int, sizes: Sequence[int], group: Group) -> list[Tensor]:
    """Return every rank's x, which have `sizes` along a dim. One all-gather of the largest size."""
    pieces = gathered(padded(x, dim, max(sizes)).contiguous(), group).chunk(len(sizes))
    return [piece.narrow(dim, 0, size) for piece, size in zip(pieces, sizes, strict=True)]


def join(x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """Return the ranks' x (B,sizes[rank],D) as one on all of them, which go on with the same computation.

    All ranks have the same gradient then, so that their sum, a multiple of one, needs no exchange.
    """
    return _Join.apply(x, tuple(sizes), group)


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sizes, group: Any) -> Tensor:
        ctx.args = sizes, rank_in(group)
        return torch.cat(gather(x, 1, sizes, group), dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        sizes, rank = ctx.args
        return grad.split(sizes, dim=1)[rank] * len(sizes), None, None
