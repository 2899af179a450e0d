"""Clipping gradients by a norm that is known."""

import pytest
import torch

from cvx_parallel.gradients import shrink


@pytest.mark.parametrize("most", [0.5, 4.9, 5.0, 5.1, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_become_what_torch_makes_of_them(most, dtype):
    params = [torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for _ in range(2)]
    expected = [torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for _ in range(2)]
    for param in (params, expected):
        param[0].grad = torch.tensor([3.0, 0.0], dtype=dtype)
        param[1].grad = torch.tensor([0.0, -4.0], dtype=dtype)
    norm = torch.tensor(5.0)
    torch.nn.utils.clip_grads_with_norm_(expected, most, norm)
    shrink(params, most, norm)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(params, expected, strict=True))


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_not_taken_for_a_small_one(norm):
    param = torch.nn.Parameter(torch.zeros(1))
    param.grad = torch.ones(1)
    shrink([param], 1.0, torch.tensor(norm))
    assert param.grad.item() != 1.0
