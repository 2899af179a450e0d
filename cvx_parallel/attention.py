"""Attention over one block of keys, with what it takes to merge blocks and to differentiate them one by one.

The log-sum-exp of a query's scores weighs a block against others, so keys may come in any number of blocks.
Shapes: queries (B,N,Q,K), keys and values (B,N,M,K), log-sum-exp (B,N,Q) in float32 or float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SCORES = 2**28
"""Scores that are held at a time where no fused kernel serves a device or dtype."""

Gradients = tuple[Tensor, Tensor, Tensor]

_ops = torch.ops.aten


class Seen(NamedTuple):
    """What queries got from the keys they have seen so far."""

    out: Tensor
    lse: Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which blocks are summed: float32, or float64 where all is."""
    return torch.promote_types(dtype, torch.float32)


def forward(q: Tensor, k: Tensor, v: Tensor) -> Seen:
    """Return softmax(q k^T / sqrt(K)) v and the log-sum-exp; zeros and -inf where there are no keys."""
    if not (q.numel() and k.numel()):
        return Seen(torch.zeros_like(q), q.new_full(q.shape[:-1], -math.inf, dtype=wide(q.dtype)))
    if q.device.type == "cpu":
        return Seen(*_ops._scaled_dot_product_flash_attention_for_cpu(q, k, v))
    if _has_flash(q):
        out, lse, *_ = _ops._scaled_dot_product_flash_attention(q, k, v)
        return Seen(out, lse)
    return _plain_forward(q, k, v)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Gradients:
    """Return what one block of keys adds to the gradient of q, and the gradients of its k and v.

    seen: what q got from all blocks together; grad: the gradient of its `out`.
    """
    if not (q.numel() and k.numel()):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if q.device.type == "cpu":
        return _ops._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, seen.out, seen.lse, 0.0, False
        )
    if _has_flash(q):
        return _flash_backward(grad, q, k, v, seen)
    return _plain_backward(grad, q, k, v, seen)


def merge(seen: Seen, more: Seen) -> Seen:
    """Return what queries got from the keys of both; `out` in `wide`.

    Source: Milakov & Gimelshein 2018 (arXiv 1805.02867), section 3.1, for two blocks.
    """
    lse = torch.logaddexp(seen.lse, more.lse)
    out = seen.out * (seen.lse - lse).exp().unsqueeze(-1)
    return Seen(torch.addcmul(out, more.out.to(out.dtype), (more.lse - lse).exp().unsqueeze(-1)), lse)


def _has_flash(q: Tensor) -> bool:
    """Tell whether torch's flash kernels take these queries."""
    is_half = q.dtype in (torch.float16, torch.bfloat16)
    return q.device.type == "cuda" and is_half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Gradients:
    """Call the kernel with the state of a random generator that it does not use without dropout."""
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)
    sizes = (None, None, q.shape[2], k.shape[2])
    return _ops._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, seen.out, seen.lse, *sizes, 0.0, False, unused, unused
    )


def _plain_forward(q: Tensor, k: Tensor, v: Tensor) -> Seen:
    outs, lses = [], []
    for part in q.split(_rows(q, k), dim=2):
        scores = _scores(part, k)
        lse = scores.logsumexp(-1)
        outs.append(((scores - lse.unsqueeze(-1)).exp_() @ v.to(scores.dtype)).to(q.dtype))
        lses.append(lse)
    return Seen(torch.cat(outs, dim=2), torch.cat(lses, dim=2))


def _plain_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Gradients:
    dtype, rows = wide(q.dtype), _rows(q, k)
    dq, dk, dv = [], torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    columns = (grad, q, *seen)
    for part_grad, part, out, lse in zip(*(x.split(rows, dim=2) for x in columns), strict=True):
        part_grad = part_grad.to(dtype)
        weights = (_scores(part, k) - lse.unsqueeze(-1)).exp_()
        dv += weights.mT @ part_grad
        mean = (part_grad * out).sum(-1, keepdim=True)
        scores = weights * (part_grad @ v.to(dtype).mT - mean) / math.sqrt(q.shape[-1])
        dq.append((scores @ k.to(dtype)).to(q.dtype))
        dk += scores.mT @ part.to(dtype)
    return torch.cat(dq, dim=2), dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    dtype = wide(q.dtype)
    return q.to(dtype) @ k.to(dtype).mT / math.sqrt(q.shape[-1])


def _rows(q: Tensor, k: Tensor) -> int:
    """Return how many queries are taken at a time."""
    return max(1, SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
