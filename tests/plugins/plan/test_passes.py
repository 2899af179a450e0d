"""Activations as planned, against what torch's CPU allocator hands out in the same pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cvx_core.building import build
from cvx_core.interfaces import Condition
from cvx_core.placing import place
from cvx_core.recipe import parse
from cvx_core.spec import resolve
from cvx_plugins.plan.layout import Layout
from cvx_plugins.plan.live import dropped_gradients
from cvx_plugins.plan.passes import Passes, Sample
from tests.distributed.harness import on_ranks
from tests.plugins.plan.recipes import plan_of, text

ROWS = 2
SIZES = {
    "num_heads": 4,
    "head_dim": 32,
    "num_layers": 6,
    "video": {"frames": 17, "height": 192, "width": 256},
}


def measured(recipe: str) -> tuple[int, int]:
    """Return bytes kept after the forward pass, and the most there were at any time, gradients left out."""
    spec = resolve(parse(recipe))
    parts = place(build(spec), spec)
    predictor = parts.predictor.train()
    dtype = next(predictor.parameters()).dtype
    sample = Sample(spec)
    latent = torch.randn(ROWS, *sample.shape, dtype=dtype)
    words = torch.randn(ROWS, 5, 12, dtype=dtype)
    image = torch.randn_like(latent) if spec.card.image_latent != "none" else None
    condition = Condition(words, torch.ones(ROWS, 5, dtype=torch.bool), image)
    timestep, target = torch.full((ROWS,), 500), torch.randn_like(latent, dtype=torch.float32)
    parts.before_update(False)  # what averages gradients is not part of it
    with dropped_gradients(predictor), torch.autograd.profiler.profile(profile_memory=True) as memory:
        error = F.mse_loss(predictor(latent, timestep, condition).float(), target, reduction="none")
        loss = error.flatten(1).mean(1).mean()
        del error
        marker = torch.zeros(987_654)  # its size tells where the backward pass begins
        del marker
        loss.backward()
    return _now_and_peak(memory)


def _now_and_peak(memory: Any) -> tuple[int, int]:
    now = most = kept = 0
    events = [e for e in memory.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.nbytes() == 4 * 987_654:
            kept = now
        if abs(event.nbytes()) != 4 * 987_654:
            now += event.nbytes()
        most = max(most, now)
    return kept, most


def assert_close(got: tuple[int, int], spec: Any, share: float = 0.05) -> None:
    passes = Passes(Layout(spec), Sample(spec))
    planned = passes.of(SIZES["num_layers"], True, True, ROWS)
    for have, want in zip((planned.kept + passes.tables, planned.peak + passes.tables), got, strict=True):
        assert abs(have - want) <= share * want, (planned, got)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "parallel",
    [
        [],
        [{"use": "recompute"}],
        [{"use": "recompute", "mode": "selective"}],
        [{"use": "recompute", "every": 2}],
    ],
)
def test_activations_of_one_rank(parallel, dtype):
    changes = {**SIZES, "dtype": dtype}
    assert_close(measured(text(parallel, 1, plan=False, **changes)), plan_of(parallel, 1, **changes))


SHARED = {
    "ulysses": [{"use": "cp", "ulysses": 2}],
    "ring": [{"use": "cp", "ring": 2}],
    "tp": [{"use": "tp"}],
    "sequence": [{"use": "tp", "sequence": True}],
    "ulysses, recompute": [{"use": "cp", "ulysses": 2}, {"use": "recompute"}],
}


def measured_all(recipes: list[str]) -> list[tuple[int, int]]:
    """Return what `measured` does for several recipes, one after the other."""
    return [measured(recipe) for recipe in recipes]


def test_activations_of_two_ranks():
    first, _ = on_ranks(2, measured_all, [text(p, 2, plan=False, **SIZES) for p in SHARED.values()])
    for got, parallel in zip(first, SHARED.values(), strict=True):
        assert_close(got, plan_of(parallel, 2, **SIZES))
