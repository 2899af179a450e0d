"""Attention with keys and values that go round: queries stay, and every rank's video passes every rank.

Source: Liu et al. 2023 (arXiv 2310.01889), section 3. Text is on every rank already and does not travel; its
queries are computed by every rank.

Per call and rank, forward: P-1 sends of 2 B N S K / P elements. Backward: twice as many, the gradients among
them in float32 at least. A send runs while the block before it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cvx_parallel import attention
from cvx_parallel.attention import Seen
from cvx_parallel.tokens import Lengths, check


class Ring:
    """An `attend` slot over a group of ranks. It replaces the one before: it has to know log-sum-exps.

    where: the module whose slot it is, for messages.
    """

    def __init__(self, group: dist.ProcessGroup, lengths: Callable[[], Lengths], where: str = "attention"):
        self._group, self._lengths, self._where = group, lengths, where
        self._rank = dist.get_rank(group)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B,N,L+s,K) for q, k, v (B,N,L+s,K): the text, then this rank's video.

        Raises CvxError for a mask.
        """
        text, video = self._lengths()
        check(q, mask, text + video[self._rank], self._where)
        return _RingAttention.apply(q, k, v, text, video, self._group)


class _Passing:
    """A tensor on its way to the next rank, while the previous rank's comes in.

    dim 3 is of tokens; `length` of them come in. What is empty is not sent.
    """

    def __init__(self, x: Tensor, length: int, group: dist.ProcessGroup):
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        self._sent = x.contiguous()
        self._received = x.new_empty(*x.shape[:3], length, *x.shape[4:])
        following, previous = (dist.get_global_rank(group, (rank + step) % world) for step in (1, -1))
        ops = []
        if self._sent.numel():
            ops.append(dist.P2POp(dist.isend, self._sent, following, group))
        if self._received.numel():
            ops.append(dist.P2POp(dist.irecv, self._received, previous, group))
        self._works = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> Tensor:
        """Return what came in."""
        for work in self._works:
            work.wait()
        return self._received


class _RingAttention(Function):
    """Blocks are computed anew in the backward pass, from the whole rows' outputs and log-sum-exps."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        text: int,
        video: Sequence[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.where = (text, video, group)
        lengths = _coming(video, group)
        passing = _Passing(torch.stack((k, v))[..., text:, :], lengths[0], group)
        seen = attention.forward(q, k, v)
        seen = Seen(seen.out.to(attention.wide(q.dtype)), seen.lse)
        for length in (*lengths[1:], None):
            block = passing.wait()
            if length is not None:
                passing = _Passing(block, length, group)
            if block.numel():
                seen = attention.merge(seen, attention.forward(q, block[0], block[1]))
        out = seen.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, seen.lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        text, video, group = ctx.where
        seen, wide, lengths = Seen(out, lse), attention.wide(q.dtype), _coming(video, group)
        passing = _Passing(torch.stack((k, v))[..., text:, :], lengths[0], group)
        dq, dk, dv = (x.to(wide) for x in attention.backward(grad, q, k, v, seen))
        gradients: _Passing | None = None  # those of the block that comes next, from the ranks it has passed
        for step, length in enumerate((*lengths[1:], video[dist.get_rank(group)]), start=1):
            block = passing.wait()
            if step < len(lengths):
                passing = _Passing(block, length, group)
            more, block_k, block_v = attention.backward(grad, q, block[0], block[1], seen)
            dq += more
            total = torch.stack((block_k, block_v)).to(wide)
            if gradients is not None:
                total += gradients.wait()
            gradients = _Passing(total, length, group)
        assert gradients is not None
        own = gradients.wait()
        dk[:, :, text:] += own[0]
        dv[:, :, text:] += own[1]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _coming(video: Sequence[int], group: dist.ProcessGroup) -> list[int]:
    """Return the lengths of the blocks that come in, in their order: the previous rank's first."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    return [video[(rank - step) % world] for step in range(1, world)]
