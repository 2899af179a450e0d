"""Attention over a ring, as far as the first rank's memory and operations go; see cvx_parallel.ring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cvx_parallel import attention
from cvx_parallel.attention import Seen

_ops = torch.ops.aten


class Round(Function):
    """Keys and values of every rank pass by: what comes is there beside what is sent, gradients likewise."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, text: int, coming: Sequence[int]) -> Tensor:
        """coming: tokens of the blocks that come in, in their order."""
        ctx.where = text, coming
        sent = torch.stack((k, v))[..., text:, :].contiguous()
        block = _room(sent, coming[0])
        seen = _forward(q, k, v)
        seen = Seen(seen.out.to(attention.wide(q.dtype)), seen.lse)
        for length in (*coming[1:], None):
            sent = block
            block = _room(sent, length) if length is not None else sent
            seen = attention.merge(seen, _forward(q, sent[0], sent[1]))
        out = seen.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, seen.lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        text, coming = ctx.where
        wide, own = attention.wide(q.dtype), k.shape[2] - text
        sent = torch.stack((k, v))[..., text:, :].contiguous()
        block = _room(sent, coming[0])
        dq, dk, dv = (x.to(wide) for x in _backward(grad, q, k, v, out, lse))
        leaving = arriving = None
        for length in (*coming[1:], None):
            sent = block
            block = _room(sent, length) if length is not None else sent
            more, block_k, block_v = _backward(grad, q, sent[0], sent[1], out, lse)
            dq += more
            total = torch.stack((block_k, block_v)).to(wide)
            if arriving is not None:
                total += arriving
            leaving, arriving = total, _room(total, own if length is None else length)
        assert arriving is not None
        dk[:, :, text:] += arriving[0]
        dv[:, :, text:] += arriving[1]
        del leaving
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _room(like: Tensor, length: int) -> Tensor:
    return like.new_empty(*like.shape[:3], length, *like.shape[4:])


def _forward(q: Tensor, k: Tensor, v: Tensor) -> Seen:
    return Seen(*_ops._scaled_dot_product_flash_attention_for_cpu(q, k, v))


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
    return _ops._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)
