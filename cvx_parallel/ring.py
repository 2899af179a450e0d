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

_GROUPS: dict[str, dist.ProcessGroup] = {}
"""By name, which is what operations of torch can be given."""


class Ring:
    """An `attend` slot over a group of ranks. It replaces the one before: it has to know log-sum-exps.

    where: the module whose slot it is, for messages.
    """

    def __init__(self, group: dist.ProcessGroup, lengths: Callable[[], Lengths], where: str = "attention"):
        self._group, self._lengths, self._where = group, lengths, where
        _GROUPS[group.group_name] = group
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
        ctx.where = text, list(video), group.group_name
        out, lse = torch.ops.cvx.ring_attention(q, k, v, *ctx.where)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = torch.ops.cvx.ring_attention_backward(grad, *ctx.saved_tensors, *ctx.where)
        return (*gradients, None, None, None)


# As one operation each: selective recompute keeps the rows' outputs, not those of every block, and
# torch.compile need not look inside.
@torch.library.custom_op(
    "cvx::ring_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, SymInt text, SymInt[] video, str group) -> (Tensor, Tensor)",
)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, text: int, video: Sequence[int], group: str
) -> tuple[Tensor, Tensor]:
    """Return outputs and log-sum-exps."""
    ranks = _GROUPS[group]
    lengths = _coming(video, ranks)
    passing = _Passing(torch.stack((k, v))[..., text:, :], lengths[0], ranks)
    seen = attention.forward(q, k, v)
    seen = Seen(seen.out.to(attention.wide(q.dtype)), seen.lse)
    for length in (*lengths[1:], None):
        block = passing.wait()
        if length is not None:
            passing = _Passing(block, length, ranks)
        if block.numel():
            seen = attention.merge(seen, attention.forward(q, block[0], block[1]))
    return seen.out.to(q.dtype), seen.lse


@torch.library.custom_op(
    "cvx::ring_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, SymInt text, SymInt[] video, "
    "str group) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    text: int,
    video: Sequence[int],
    group: str,
) -> attention.Gradients:
    ranks = _GROUPS[group]
    seen, wide, lengths = Seen(out, lse), attention.wide(q.dtype), _coming(video, ranks)
    passing = _Passing(torch.stack((k, v))[..., text:, :], lengths[0], ranks)
    dq, dk, dv = (x.to(wide) for x in attention.backward(grad, q, k, v, seen))
    gradients: _Passing | None = None  # those of the block that comes next, from the ranks it has passed
    for step, length in enumerate((*lengths[1:], video[dist.get_rank(ranks)]), start=1):
        block = passing.wait()
        if step < len(lengths):
            passing = _Passing(block, length, ranks)
        more, block_k, block_v = attention.backward(grad, q, block[0], block[1], seen)
        dq += more
        total = torch.stack((block_k, block_v)).to(wide)
        if gradients is not None:
            total += gradients.wait()
        gradients = _Passing(total, length, ranks)
    assert gradients is not None
    own = gradients.wait()
    dk[:, :, text:] += own[0]
    dv[:, :, text:] += own[1]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@_forward.register_fake
def _(q: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=attention.wide(q.dtype))


@_backward.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: Any) -> attention.Gradients:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _coming(video: Sequence[int], group: dist.ProcessGroup) -> list[int]:
    """Return the lengths of the blocks that come in, in their order: the previous rank's first."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    return [video[(rank - step) % world] for step in range(1, world)]
