"""Every optimizer learns, and steps as the method's own release does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from came_pytorch import CAME
from prodigyopt import Prodigy
from safetensors.torch import load_file
from torch import nn

from cvx_core import CvxError, PluginError
from cvx_core.interfaces import ParamGroup
from cvx_plugins.optimizers.blockwise import dequantised, levels, quantise
from tests.plugins.optimizers import reference_8bit
from tests.plugins.optimizers.models import built, loss_of, maker, model, train

SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 3e-3},
    "adamw-8bit": {"lr": 3e-3},
    "came": {"lr": 3e-3},
    "prodigy": {"safeguard_warmup": True},
}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("use", SETTINGS)
def test_learns(use, offload):
    module = model()
    losses = train(module, built(use, module, offload=offload, **SETTINGS[use]), 60)
    assert sum(losses[-5:]) < sum(losses[:5]) / 4


@pytest.mark.parametrize("fused", ["auto", False])
def test_offloaded_adamw_steps_as_torchs(fused):
    ours, theirs = model(), model()
    settings = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "fused": fused}
    losses = [
        train(module, built("adamw", module, offload=offload, **settings), 5)
        for module, offload in ((ours, True), (theirs, False))
    ]
    assert losses[0] == losses[1]
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_gradients_leave_their_parameters_and_add_up():
    module, other = model(), model()
    optimizer = built("adamw", module, offload=True)
    for number in range(2):
        for one in (module, other):
            loss_of(one, number).backward()
    for mine, its in zip(module.parameters(), other.parameters(), strict=True):
        stand_in = optimizer.with_gradient(mine)  # type: ignore[attr-defined]
        assert mine.grad is None
        assert torch.equal(stand_in.grad, its.grad)
        assert stand_in.untyped_storage().nbytes() == 4
    optimizer.zero_grad()
    assert all(optimizer.with_gradient(p).grad is None for p in module.parameters())  # type: ignore[attr-defined]


def matrices() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def both(ours: torch.optim.Optimizer, mine: nn.Module, theirs: Any, other: nn.Module, steps: int) -> None:
    """Step both on the same gradients; they must end at the same weights."""
    other.load_state_dict(mine.state_dict())
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        inputs = torch.randn(7, 6, generator=generator, dtype=torch.float64)
        for module, optimizer in ((mine, ours), (other, theirs)):
            for group in optimizer.param_groups:
                group["lr"] *= 1.2 if step < 3 else 0.9  # a schedule
            (module(inputs) - inputs[:, :3].cos()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for got, expected in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "fields", [{}, {"betas": (0.8, 0.9, 0.95), "eps": (1e-8, 1e-6), "clip_threshold": 0.3}]
)
def test_came_steps_as_its_release(fields):
    mine, other = matrices(), matrices()
    ours = built("came", mine, lr=1e-2, weight_decay=0.1, decay_norms=True, **fields)
    both(ours, mine, CAME(other.parameters(), lr=1e-2, weight_decay=0.1, **fields), other, 20)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"decouple": False},
        {"bias_correction": True, "safeguard_warmup": True, "betas": (0.8, 0.95), "beta3": 0.9},
        {"growth_rate": 1.5, "d_coef": 2.0, "d0": 1e-4, "eps": 1e-6},
    ],
)
def test_prodigy_steps_as_its_release(fields):
    mine, other = matrices(), matrices()
    ours = built("prodigy", mine, weight_decay=0.1, decay_norms=True, **fields)
    names = {"bias_correction": "use_bias_correction"}
    their_fields = {names.get(key, key): value for key, value in fields.items()}
    theirs = Prodigy(other.parameters(), lr=1.0, weight_decay=0.1, **their_fields)
    both(ours, mine, theirs, other, 40)
    assert ours.param_groups[0]["d"] == pytest.approx(theirs.param_groups[0]["d"], rel=1e-9)
    assert ours.param_groups[0]["d"] > 10 * fields.get("d0", 1e-6)


def test_8bit_adamw_steps_as_torchaos():
    expected = load_file(reference_8bit.FILE)
    weight = nn.Parameter(reference_8bit.numbers(0))
    optimizer = maker("adamw-8bit", **reference_8bit.SETTINGS).build([ParamGroup([("weight", weight)], {})])
    for step in range(reference_8bit.STEPS):
        weight.grad = reference_8bit.numbers(step + 1)
        optimizer.step()
    torch.testing.assert_close(levels(True), expected["levels_signed"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(levels(False), expected["levels"], rtol=1e-6, atol=1e-9)
    state = optimizer.state[weight]
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(
            state[f"{key}_scale"].flatten(), expected[f"{key}_scale"], rtol=1e-5, atol=0
        )
        apart = state[f"{key}_codes"].int() - expected[f"{key}_codes"].int()
        assert apart.abs().max() <= 1  # a value half-way between two levels
        assert (apart == 0).float().mean() > 0.999
    close = (weight - expected["weight"]).abs() < 1e-6
    assert close.float().mean() > 0.998


@pytest.mark.parametrize("shape", [(4, 256), (3, 300), (5, 3, 5, 5), (0, 300), (2, 64)])
@pytest.mark.parametrize("is_signed", [True, False])
def test_quantised_values_are_near_and_rows_are_their_own(shape, is_signed):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-9
    values = values if is_signed else values.square()
    blocks = -(-values[0:1].numel() // 128) if shape[0] else -(-300 // 128)
    codes, scale = torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape[0], blocks)
    quantise(values, codes, scale, is_signed=is_signed, block=128)
    back = dequantised(codes, scale, is_signed=is_signed, block=128)
    for row in range(shape[0]):
        biggest = values[row].abs().max()
        assert (back[row] - values[row]).abs().max() < 0.01 * biggest
        alone, own = torch.zeros_like(codes[:1]), torch.zeros_like(scale[:1])
        quantise(values[row : row + 1], alone, own, is_signed=is_signed, block=128)
        assert torch.equal(alone[0], codes[row])
        assert torch.equal(own[0], scale[row])


@pytest.mark.parametrize("is_signed", [True, False])
def test_a_code_is_that_of_the_nearest_level(is_signed):
    """Also next to the bounds between levels, for numbers of every size, and at the ends."""
    known = levels(is_signed)
    bounds = (known[1:] + known[:-1]) / 2
    small = torch.logspace(-12, 0, 20000)
    tricky = [bounds, bounds.nextafter(known[1:]), bounds.nextafter(known[:-1]), known, small]
    values = torch.cat([*tricky, -small] if is_signed else tricky)[None]
    codes, scale = torch.zeros_like(values, dtype=torch.uint8), torch.zeros(1, 1)
    quantise(values, codes, scale, is_signed=is_signed, block=values.numel())
    nearest = torch.bucketize(values, bounds)
    expected = nearest if is_signed else nearest.clamp_min((values > 0).long())
    assert float(scale) == 1.0
    assert torch.equal(codes.long(), expected)


def test_a_square_above_zero_stays_above_zero():
    """Else a mean is divided by eps alone, a hundred million times too large."""
    values = torch.full((1, 256), 1e-12)
    values[0, 0], values[0, 1] = 1.0, 0.0
    codes, scale = torch.zeros(1, 256, dtype=torch.uint8), torch.zeros(1, 1)
    quantise(values, codes, scale, is_signed=False, block=256)
    back = dequantised(codes, scale, is_signed=False, block=256)
    assert back[0, 1] == 0
    assert back[0, 2:].min() > 0


@pytest.mark.parametrize("use", SETTINGS)
def test_groups_exemptions_and_unknown_options(use):
    module = model()
    named = list(module.named_parameters())
    options = {"weight_decay": 0.2} if use == "prodigy" else {"lr": 1e-5, "weight_decay": 0.2}
    groups = [ParamGroup(named[:2], {}), ParamGroup(named[2:], options)]
    optimizer = maker(use, weight_decay=0.1, offload=True).build(groups)
    decays = sorted((group["weight_decay"], len(group["params"])) for group in optimizer.param_groups)
    assert decays == [(0.0, 1), (0.0, 4), (0.1, 1), (0.2, 2)]
    if use != "prodigy":
        assert optimizer.param_groups[-1]["lr"] == 1e-5
    with pytest.raises(PluginError, match="Did you mean 'weight_decay'"):
        maker(use, offload=True).build([ParamGroup(named, {"weight_decy": 0.1})])
    with pytest.raises(CvxError, match="no parameters to train"):
        maker(use, offload=True).build([])


@pytest.mark.parametrize("use", SETTINGS)
def test_a_group_steps_with_its_own_settings(use):
    """A parameter decays by its group's lr times decay, and by nothing where it is exempt."""
    parameters = {name: nn.Parameter(torch.ones(2, 64)) for name in ("a", "b", "bias")}
    groups = [ParamGroup([("a", parameters["a"]), ("bias", parameters["bias"])], {})]
    groups.append(ParamGroup([("b", parameters["b"])], {"weight_decay": 0.5}))
    optimizer = maker(
        use, weight_decay=0.1, offload=True, **({"d0": 0.1} if use == "prodigy" else {"lr": 0.1})
    ).build(groups)
    for param in parameters.values():
        param.grad = torch.ones_like(param)
    optimizer.step()
    step = 1 - float(parameters["bias"].detach().mean())
    assert step > 0
    assert 1 - step - float(parameters["a"].detach().mean()) == pytest.approx(0.01, rel=0.1)
    assert 1 - step - float(parameters["b"].detach().mean()) == pytest.approx(0.05, rel=0.1)


def test_prodigy_goes_nowhere_at_rate_zero_or_without_gradients():
    module = model()
    optimizer, before = built("prodigy", module), [p.detach().clone() for p in module.parameters()]
    for rate in (0.0, 1.0):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for param in module.parameters():
            param.grad = torch.full_like(param, 1.0 - rate)
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
    assert optimizer.param_groups[0]["updates"] == 0
    assert torch.isfinite(loss_of(module, 0))
