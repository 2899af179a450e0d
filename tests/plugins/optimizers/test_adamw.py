"""Parameter groups, decay exemption, and steps equal to torch's own AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from cvx_core import CvxError, PluginError, Registry
from cvx_core.interfaces import ParamGroup


def adamw(**fields: Any) -> Any:
    component = Registry.discover().get("optimizer", "adamw")
    assert component.config is not None
    return component.load()(component.config(**fields), None)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def group(module: nn.Module, **options: Any) -> ParamGroup:
    return ParamGroup(list(module.named_parameters()), options)


def shapes(optimizer: torch.optim.Optimizer, weight_decay: float) -> list[tuple[int, ...]]:
    return sorted(
        tuple(parameter.shape)
        for part in optimizer.param_groups
        if part["weight_decay"] == weight_decay
        for parameter in part["params"]
    )


def test_only_matrices_decay() -> None:
    optimizer = adamw(weight_decay=0.1).build([group(model())])
    assert shapes(optimizer, 0.1) == [(2, 8), (8, 4)]
    assert shapes(optimizer, 0.0) == [(2,), (8,), (8,), (8,)]


def test_everything_decays_where_asked() -> None:
    optimizer = adamw(weight_decay=0.1, decay_norms=True).build([group(model())])
    assert len(shapes(optimizer, 0.1)) == 6
    assert len(optimizer.param_groups) == 1


def test_options_of_a_group_override_the_config() -> None:
    first, second = model(), model()
    optimizer = adamw(lr=1e-3, weight_decay=0.1).build(
        [group(first), group(second, lr=5e-4, weight_decay=0.2)]
    )
    rates = {part["lr"]: len(part["params"]) for part in optimizer.param_groups}
    assert set(rates) == {1e-3, 5e-4}
    assert shapes(optimizer, 0.2) == [(2, 8), (8, 4)]
    assert len(shapes(optimizer, 0.0)) == 8


def test_unknown_option_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(PluginError, match="Did you mean 'weight_decay'"):
        adamw().build([group(model(), weight_decy=0.1)])


def test_nothing_to_train_is_an_error() -> None:
    for groups in ([], [ParamGroup([], {})]):
        with pytest.raises(CvxError, match="no parameters to train"):
            adamw().build(groups)


@pytest.mark.parametrize("fused", ["auto", True, False])
def test_steps_are_those_of_torch(fused: Any) -> None:
    ours, theirs = model(), model()
    optimizer = adamw(lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, fused=fused).build([group(ours)])
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    oracle = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.8, 0.9),
        eps=1e-6,
        weight_decay=0.1,
        foreach=False,
    )
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        for module, stepper in ((ours, optimizer), (theirs, oracle)):
            stepper.zero_grad()
            module(inputs).square().mean().backward()
            stepper.step()
    for got, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("fused", "expected"), [("auto", True), (True, True), (False, None)])
def test_fused_kernel_is_used_on_the_cpu_unless_refused(fused: Any, expected: bool | None) -> None:
    assert adamw(fused=fused).build([group(model())]).defaults["fused"] is expected


def test_parameters_of_different_meshes_are_kept_apart() -> None:
    plain, placed = model(), model()
    for parameter in placed.parameters():
        parameter.device_mesh = "mesh"  # type: ignore[attr-defined]
    named = [*plain.named_parameters(), *((f"placed.{n}", p) for n, p in placed.named_parameters())]
    parts = adamw().build([ParamGroup(named, {})]).param_groups
    assert len(parts) == 4
    for part in parts:
        assert len({getattr(parameter, "device_mesh", None) for parameter in part["params"]}) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"betas": (0.9, 1.0)},
        {"eps": 0.0},
        {"weight_decay": -0.1},
        {"fused": "yes?"},
    ],
)
def test_bad_values_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        adamw(**fields)
