"""A clip's tokens over ranks: each has a contiguous run of the video, and all of the text.

Runs differ by one token at most, so any number of tokens goes over any number of ranks. Gradients: every rank
computes the same loss from the whole prediction, and every collective is the exact adjoint of its forward
pass, so that averaging parameters' gradients over the ranks gives those of one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvx_core.errors import CvxError
from cvx_core.interfaces import Tokens
from cvx_parallel.collectives import Group, rank_in
from cvx_parallel.pieces import join, shares

Slot = Callable[[Tokens], Tokens]
Run = Callable[[Slot, Tokens], Tokens]


class Lengths(NamedTuple):
    """How many tokens attention sees. text: on every rank; video: of each rank of a group, in its order."""

    text: int
    video: tuple[int, ...]


class Context:
    """Video tokens over a group of ranks, ring x ulysses, the ring outside.

    Attention cannot tell text from video; `watch` notes lengths when tokens enter a block, and `of_ulysses`
    and `of_ring` return them.
    """

    def __init__(self, group: Group, ring: int, ulysses: int):
        self._group, self._rank = group, rank_in(group)
        self._ring, self._ulysses = ring, ulysses
        self._now = Lengths(0, (0,) * (ring * ulysses))

    def split(self, tokens: Tokens) -> Tokens:
        """Keep this rank's run of the video, and the rows of the rotary tables that belong to it.

        A copy: a view would keep the rest in memory, and have the first block compiled for its strides alone.
        """
        sizes = list(self._sizes(tokens))
        mine = tokens.video.split(sizes, dim=1)[self._rank].clone(memory_format=torch.contiguous_format)
        rope = tokens.rope
        if rope is not None:
            cos, sin = (table.split(sizes)[self._rank] for table in rope)
            rope = (cos, sin)
        return tokens._replace(video=mine, rope=rope)

    def join(self, tokens: Tokens) -> Tokens:
        """Return the whole video on every rank; rotary tables stay as they are. One all-gather of S/P D."""
        return tokens._replace(video=join(tokens.video, self._sizes(tokens), self._group))

    def watch(self, run: Run) -> Run:
        """Return a block's `run` that notes lengths: ranks may have blocks and split nothing themselves."""

        def noting(body: Slot, tokens: Tokens) -> Tokens:
            self._now = Lengths(tokens.text.shape[1], self._sizes(tokens))
            return run(body, tokens)

        return noting

    def of_ulysses(self) -> Lengths:
        """Return the lengths on the ranks that share out heads with this one."""
        first = self._rank // self._ulysses * self._ulysses
        return Lengths(self._now.text, self._now.video[first : first + self._ulysses])

    def of_ring(self) -> Lengths:
        """Return the lengths on the ranks of this one's ring, each with the video of its ulysses group."""
        firsts = range(0, self._ring * self._ulysses, self._ulysses)
        sums = tuple(sum(self._now.video[first : first + self._ulysses]) for first in firsts)
        return Lengths(self._now.text, sums)

    def _sizes(self, tokens: Tokens) -> tuple[int, ...]:
        return shares(math.prod(tokens.grid), self._ring * self._ulysses)


def share_tokens(predictor: Any, context: Context) -> None:
    """Put a context around a predictor's own split and join, and tell it of what enters each block."""
    split, join = predictor.split, predictor.join
    predictor.split = lambda tokens: split(context.split(tokens))
    predictor.join = lambda tokens: context.join(join(tokens))
    for block in predictor.blocks.values():
        block.run = context.watch(block.run)


def check(q: Tensor, mask: Tensor | None, length: int, where: str) -> None:
    """Raise CvxError for a mask, and for queries (B,N,L+S,K) that are not as many as entered the block.

    where: the module that attends.
    """
    if mask is not None:
        raise CvxError(
            f"{where}: got a mask {list(mask.shape)}, but with `cp` a rank sees some of the tokens only, "
            "and masks are not shared out. Leave out `cp`, or use a predictor that masks nothing."
        )
    if q.shape[2] != length:
        raise CvxError(
            f"{where}: got queries {list(q.shape)} of {q.shape[2]} tokens where {length} entered the block "
            "last. With `cp`, a block may only be run again for the tokens that it saw last. Leave out "
            "`cp`, or use a predictor that attends to all tokens of a block."
        )
