"""Blocks of attention: each device's way of computing them, and merging."""

import pytest
import torch
from torch.nn import functional as F

from cvx_parallel import attention
from cvx_parallel.attention import Seen


@pytest.fixture
def inputs():
    """Queries, two blocks of keys and values, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    make = lambda length: torch.randn(2, 3, length, 16, dtype=torch.float64, generator=generator)  # noqa: E731
    return make(11), (make(7), make(7)), (make(5), make(5)), make(11)


def whole(q, first, second, grad):
    """Return what one call over both blocks gives, and its gradients."""
    leaves = [x.requires_grad_() for x in (q.clone(), torch.cat((first[0], second[0]), 2))]
    leaves.append(torch.cat((first[1], second[1]), 2).requires_grad_())
    out = F.scaled_dot_product_attention(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("way", ["fused", "plain", "plain in slices"])
def test_merged_blocks_are_one_attention(way, inputs, monkeypatch):
    q, first, second, grad = inputs
    forward, backward = attention.forward, attention.backward
    if way != "fused":
        forward, backward = attention._plain_forward, attention._plain_backward
    if way == "plain in slices":
        monkeypatch.setattr(attention, "SCORES", 2 * 3 * 7 * 4)
    seen = attention.merge(forward(q, *first), forward(q, *second))
    out, (dq, dk, dv) = whole(*inputs)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(seen.out, out, **close)
    blocks = [backward(grad, q, *block, seen) for block in (first, second)]
    torch.testing.assert_close(blocks[0][0] + blocks[1][0], dq, **close)
    torch.testing.assert_close(torch.cat((blocks[0][1], blocks[1][1]), 2), dk, **close)
    torch.testing.assert_close(torch.cat((blocks[0][2], blocks[1][2]), 2), dv, **close)


def test_a_block_without_keys_changes_nothing(inputs):
    q, first, (k, v), grad = inputs
    seen = attention.forward(q, *first)
    none = attention.forward(q, k[:, :, :0], v[:, :, :0])
    for merged in (attention.merge(seen, none), attention.merge(none, seen)):
        torch.testing.assert_close(merged, seen, rtol=0, atol=0)
    dq, dk, dv = attention.backward(grad, q, k[:, :, :0], v[:, :, :0], seen)
    assert not dq.any()
    assert dk.shape == dv.shape == (2, 3, 0, 16)


def test_half_precision_is_summed_in_float32():
    q, k, v = torch.randn(3, 2, 3, 14, 16, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    one = attention.forward(q, k[:, :, :6], v[:, :, :6])
    two = attention._plain_forward(q, k[:, :, 6:], v[:, :, 6:])
    assert {x.out.dtype for x in (one, two)} == {torch.bfloat16}
    assert {x.lse.dtype for x in (one, two)} == {torch.float32}
    seen = attention.merge(Seen(one.out.float(), one.lse), two)
    assert seen.out.dtype == torch.float32
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(seen.out, expected, rtol=0, atol=1e-2)
