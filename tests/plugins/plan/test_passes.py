"""Activations as planned, against what torch's CPU allocator hands out in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._C._profiler import _EventType

from cvx_core.building import build
from cvx_core.interfaces import Condition, Features
from cvx_core.placing import place
from cvx_core.random import Draws
from cvx_core.recipe import parse
from cvx_core.spec import resolve
from cvx_parallel.sliced import held
from cvx_plugins.plan.figures import planned
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


def ready(recipe: str) -> tuple[Any, Callable[[], torch.Tensor], list[torch.Tensor]]:
    """Return a predictor, what computes its loss, and what it is given."""
    spec = resolve(parse(recipe))
    parts = place(build(spec), spec)
    predictor = parts.predictor.train()
    dtype = next(predictor.parameters()).dtype
    sample = Sample(spec)
    latent = torch.randn(ROWS, *sample.shape, dtype=dtype)
    words = torch.randn(ROWS, 5, 12, dtype=dtype)
    condition = Condition(words, torch.ones(ROWS, 5, dtype=torch.bool))
    timestep, target = torch.full((ROWS,), 500), torch.randn_like(latent, dtype=torch.float32)
    parts.before_update(False)  # what averages gradients is not part of it

    def loss() -> torch.Tensor:
        error = F.mse_loss(predictor(latent, timestep, condition).float(), target, reduction="none")
        return error.flatten(1).mean(1).mean()

    return predictor, loss, [latent, words, target]


def measured(recipe: str) -> tuple[int, int]:
    """Return bytes kept after the forward pass, and the most there were at any time, gradients left out."""
    predictor, loss, _ = ready(recipe)
    with dropped_gradients(predictor), torch.autograd.profiler.profile(profile_memory=True) as memory:
        found = loss()
        marker = torch.zeros(987_654)  # its size tells where the backward pass begins
        del marker
        found.backward()
    return _now_and_peak(memory)


def saved(recipe: str) -> int:
    """Return bytes that autograd saves, parameters and what is given left out.

    Unlike the allocator, it does not depend on when the threads of a backend let go of what they sent.
    """
    predictor, loss, given = ready(recipe)
    params = (held(p) for p in predictor.parameters())
    known = {tensor.untyped_storage()._cdata for tensor in (*params, *given)}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = held(tensor).untyped_storage()
        if storage._cdata not in known:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = loss()
    count = sum(sizes.values())
    found.backward()  # the other ranks wait for it
    return count


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


def test_block_inputs_in_host_memory_are_not_counted():
    here, away = (
        Passes(Layout(spec), Sample(spec))
        for spec in (
            plan_of([{"use": "recompute", "offload": offload}], 1, **SIZES) for offload in (False, True)
        )
    )
    tokens = here.outline.video.shape[1] + here.outline.text.shape[1]
    blocks = SIZES["num_layers"]
    entering = ROWS * tokens * here.outline.video.shape[2] * here.dtype.itemsize
    before, after = (passes.of(blocks, True, True, ROWS) for passes in (here, away))
    assert before.kept - after.kept == blocks * entering
    assert before.peak - after.peak == pytest.approx((blocks - 1) * entering, rel=0.01)
    assert before.flops == after.flops


SHARED = {
    "ulysses": [{"use": "cp", "ulysses": 2}],
    "ring": [{"use": "cp", "ring": 2}],
    "tp": [{"use": "tp"}],
    "sequence": [{"use": "tp", "sequence": True}],
    "ulysses in a sequence, 2 x 2": [{"use": "cp", "ulysses": 2}, {"use": "tp", "sequence": True}],
}


def saved_all(recipes: list[str]) -> list[int]:
    """Return what `saved` does for several recipes, one after the other."""
    return [saved(recipe) for recipe in recipes]


@pytest.mark.parametrize("world", [2, 4])
def test_activations_of_several_ranks(world):
    cases = [parallel for parallel in SHARED.values() if world == 2 ** len(parallel)]
    first, *_ = on_ranks(world, saved_all, [text(p, world, plan=False, **SIZES) for p in cases])
    for got, parallel in zip(first, cases, strict=True):
        spec = plan_of(parallel, world, **SIZES)
        planned = Passes(Layout(spec), Sample(spec)).of(SIZES["num_layers"], True, True, ROWS)
        assert abs(planned.kept - got) <= 0.05 * got, (parallel, planned, got)


PIPELINES = {
    "1f1b": {"stages": [1, 3]},
    "gpipe": {"schedule": "gpipe"},
    "interleaved": {"schedule": "interleaved"},
    "zero-bubble": {"schedule": "zero-bubble"},
}
DEEP = {**SIZES, "num_layers": 4, "head_dim": 64, "video": {"frames": 9, "height": 128, "width": 192}}


def peak(recipe: str) -> int:
    """Return the most that this rank's allocator hands out in the second step, besides what it has then."""
    spec = resolve(parse(recipe))
    parts = place(build(spec), spec)
    parts.predictor.train()
    sample = Sample(spec)
    for step in range(2):
        latent = torch.randn(spec.loader.batch, *sample.shape)
        words = torch.randn(len(latent), 5, 12)
        features = Features(latent, words, torch.ones(len(latent), 5, dtype=torch.bool))
        draws = Draws(0, step, tuple(range(len(latent))), 0, 1)
        with dropped_gradients(parts.predictor), _profile() as memory:
            parts.before_update(False)
            parts.forward_backward(features, draws)
    return _most(memory)


def _most(memory: Any) -> int:
    """Return the most bytes handed out at any time of a pass that keeps nothing.

    The profiler does not see what a backend's own thread gives back, which may be the last to hold a buffer
    at the end of a collective. What is handed out anew, or is never given back, counts until the next event.
    """
    events = sorted(_allocations(memory), key=lambda event: event.start_time_ns)
    sizes = [event.extra_fields.alloc_size for event in events]
    changes, held = [0] * (len(events) + 1), {}
    for at, (event, size) in enumerate(zip(events, sizes, strict=True)):
        begun = held.pop(event.extra_fields.ptr, None)
        if begun is not None:
            changes[at if size < 0 else begun + 1] -= sizes[begun]
        if size > 0:
            changes[at] += size
            held[event.extra_fields.ptr] = at
    for begun in held.values():
        changes[begun + 1] -= sizes[begun]
    return max(accumulate(changes))


def _allocations(memory: Any) -> Iterator[Any]:
    waiting = list(memory.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            yield event


def _profile() -> Any:
    return torch.autograd.profiler.profile(profile_memory=True)


RECOMPUTE = {"use": "recompute"}
SELECTIVE = {"use": "recompute", "mode": "selective"}
ON_TWO = [
    *([{"use": "pp", "size": 2, **fields}] for fields in PIPELINES.values()),
    [{"use": "pp", "size": 2}, RECOMPUTE],
    *(
        [strategy, *again]
        for (strategy,) in list(SHARED.values())[:4]
        for again in ([], [RECOMPUTE], [SELECTIVE])
    ),
]


@pytest.mark.matrix
@pytest.mark.parametrize("parallel", ON_TWO, ids=str)
def test_peaks_of_two_ranks(parallel):
    found = on_ranks(2, peak, text(parallel, 2, plan=False, **DEEP))
    for stage in planned(plan_of(parallel, 2, **DEEP)).stages:
        assert abs(stage.activations - found[stage.rank]) <= 0.05 * found[stage.rank], (stage, found)
