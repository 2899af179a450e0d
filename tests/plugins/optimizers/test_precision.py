"""Weights in half precision: rounding at random, and masters in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cvx_core import CvxError
from cvx_core.interfaces import ParamGroup
from cvx_plugins.optimizers.rounding import stochastic
from tests.plugins.optimizers.models import built, maker, model, train

HALF = torch.bfloat16
RATES = {"adamw": 1e-4, "adamw-8bit": 1e-4, "came": 2e-6}
"""Each too little for bfloat16 in one step; CAME goes far where gradients agree."""


def one(use: str, weight: nn.Parameter, **fields: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = maker(use, **fields).build([ParamGroup([("weight", weight)], {})])
    return optimizer


def moved(use: str, dtype: torch.dtype, steps: int = 30, **fields: Any) -> nn.Parameter:
    """Return weights of about 1 after steps down, each too small for bfloat16."""
    generator = torch.Generator().manual_seed(1)
    start = (1 + torch.rand(64, 256, generator=generator) / 2).bfloat16()
    weight = nn.Parameter(start.to(dtype))
    optimizer = one(use, weight, lr=RATES[use], weight_decay=0.0, **fields)
    gradients = torch.Generator().manual_seed(2)
    for _ in range(steps):
        weight.grad = (1 + torch.rand(weight.shape, generator=gradients)).to(HALF).to(dtype)
        optimizer.step()
    return weight


@pytest.mark.parametrize("use", RATES)
def test_plain_rounding_loses_what_the_other_two_keep(use):
    start = moved(use, HALF, steps=0).detach()
    exact = moved(use, torch.float32).detach()
    assert torch.equal(moved(use, HALF, offload=True), start)  # every update is lost
    assert torch.equal(moved(use, HALF, master_weights="float32"), exact.to(HALF))
    rounded = moved(use, HALF, rounding="stochastic").detach()
    drift, expected = (start.float() - rounded.float()).mean(), (start.float() - exact).mean()
    assert float(drift) == pytest.approx(float(expected), rel=0.05)
    assert (rounded.float() - exact).abs().max() < 0.03


@pytest.mark.parametrize("use", ["adamw", "adamw-8bit", "came", "prodigy"])
@pytest.mark.parametrize("fields", [{"master_weights": "float32"}, {"rounding": "stochastic"}])
def test_learns_in_bfloat16_and_the_same_when_offloaded(use, fields):
    runs = []
    for offload in (False, True):
        module = model(HALF)
        optimizer = built(use, module, offload=offload, lr=1.0 if use == "prodigy" else 3e-3, **fields)
        losses = train(module, optimizer, 40)
        assert sum(losses[-5:]) < sum(losses[:5]) / 2
        runs.append(losses)
        for param in module.parameters():
            assert ("master" in optimizer.state[param]) == ("master_weights" in fields)
    assert runs[0] == runs[1]


def test_rounding_at_random_keeps_the_mean_and_what_it_need_not_round():
    values = torch.linspace(-3, 3, 50).repeat(4000, 1)
    rounded = stochastic(values, "w", 1)
    near = {rounded[:, i].unique().numel() for i in range(50)}
    assert near == {1, 2}  # some values are bfloat16 already
    below_and_above = (rounded.float() - values).abs()
    assert (below_and_above <= values.abs() * 2**-7 + 1e-30).all()
    gap = (values.bfloat16().float() - values).abs().max()
    assert ((rounded.float().mean(0) - values[0]).abs() < 5 * gap * 2 / 4000**0.5).all()
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-126], dtype=torch.float32)
    assert torch.equal(stochastic(exact, "w", 1).view(torch.int16), exact.bfloat16().view(torch.int16))


def test_rounding_at_random_is_the_same_for_a_key_and_another_for_others():
    values = torch.full((1000,), 1.003)
    kept = stochastic(values, "w", 1)
    assert torch.equal(kept, stochastic(values, "w", 1))
    ups = (kept > 1).float()
    for key in (("w", 2), ("v", 1)):
        other = (stochastic(values, *key) > 1).float()
        assert abs(float(torch.corrcoef(torch.stack([ups, other]))[0, 1])) < 0.12
    lagged = torch.stack([ups[:-1], ups[1:]])
    assert abs(float(torch.corrcoef(lagged)[0, 1])) < 0.12


def test_steps_draw_nothing_from_torchs_generator():
    """Ranks that hold the same have generators of their own, and must round alike."""
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(moved("adamw-8bit", HALF, rounding="stochastic"))
    assert torch.equal(*runs)


def test_rounding_at_random_makes_no_number_of_what_is_none_nor_infinity_of_the_largest():
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.38e38, -3.38e38])
    odd = torch.cat([odd, torch.tensor([-1, 2**31 - 1], dtype=torch.int32).view(torch.float32)])
    for step in range(50):
        rounded = stochastic(odd, "w", step)
        assert rounded[:2].tolist() == [float("inf"), -float("inf")]
        assert rounded[2].isnan()
        assert rounded[3:5].isfinite().all()
        assert rounded[5:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rounding_at_random_of_other_weights_is_refused(dtype):
    with pytest.raises(CvxError, match=r"optimizer.rounding: stochastic does nothing.*dtype: bfloat16"):
        one("adamw", nn.Parameter(torch.ones(2, dtype=dtype)), rounding="stochastic")


def test_masters_of_float32_weights_are_refused():
    with pytest.raises(CvxError, match=r"optimizer.master_weights does nothing"):
        one("adamw", nn.Parameter(torch.ones(2)), master_weights="float32")


def test_state_is_loaded_in_its_own_precision():
    module, other = model(HALF), model(HALF)
    optimizer = built("adamw-8bit", module, master_weights="float32")
    train(module, optimizer, 2)
    again = built("adamw-8bit", other, master_weights="float32")
    again.load_state_dict(optimizer.state_dict())
    for mine, its in zip(module.parameters(), other.parameters(), strict=True):
        assert optimizer.state[mine].keys() == again.state[its].keys()
        for key, value in optimizer.state[mine].items():
            assert again.state[its][key].dtype == value.dtype
            assert torch.equal(again.state[its][key], value)
