"""Bytes that ranks hold, as planned and as they are: on four real ranks, and on 64 that are made up."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from cvx_core.building import build
from cvx_core.interfaces import Deps, ParamGroup
from cvx_core.placing import place
from cvx_core.recipe import parse
from cvx_core.spec import resolve
from cvx_parallel.layouts import is_part
from cvx_parallel.sliced import held, state_bytes
from cvx_plugins.plan.layout import Layout
from tests.distributed.harness import on_ranks
from tests.plugins.plan.recipes import plan_of, text

CASES = {
    "zero3": [{"use": "zero3"}],
    "zero2": [{"use": "zero2"}],
    "ddp": [{"use": "ddp"}],
    "zero1": [{"use": "zero1"}],
    "layerzero": [{"use": "layerzero", "zero3_size": 2, "ignored_modules": ["patch_embed"]}],
    "tp x zero2": [{"use": "tp"}, {"use": "zero2"}],
    "tp 3 x zero3": [{"use": "tp", "size": 3}, {"use": "zero3"}],
    "pp x zero3": [{"use": "pp"}, {"use": "zero3"}],
    "pp, two stages each": [{"use": "pp", "schedule": "interleaved"}, {"use": "ddp"}],
    "cp x zero1": [{"use": "cp", "ulysses": 2}, {"use": "zero1"}],
    "cp x zero3": [{"use": "cp", "ring": 2}, {"use": "zero3"}],
    "tp x layerzero": [{"use": "tp"}, {"use": "layerzero", "zero3_size": 2}],
}

EIGHT_BITS = {"use": "adamw-8bit", "block": 64}
OPTIMIZERS = [
    ({"optimizer": EIGHT_BITS}, [{"use": "zero1"}]),
    ({"optimizer": EIGHT_BITS, "head_dim": 64, "num_heads": 2}, [{"use": "tp"}, {"use": "zero3"}]),
    ({"optimizer": {"use": "adamw", "master_weights": "float32"}, "dtype": "bfloat16"}, [{"use": "zero2"}]),
    ({"optimizer": {**EIGHT_BITS, "rounding": "stochastic"}, "dtype": "bfloat16"}, [{"use": "ddp"}]),
    ({"optimizer": {"use": "came"}}, [{"use": "pp"}, {"use": "ddp"}]),
    ({"optimizer": {"use": "prodigy"}}, [{"use": "ddp"}]),
]
"""(changes, strategies) of optimizers whose state is not two values of a weight's precision."""


def held_after_a_step(texts: list[str]) -> list[tuple[int, int, int]]:
    """Return bytes of parameters, gradients and optimizer state that this rank has, for each recipe."""
    return [_held(text) for text in texts]


def _held(recipe: str) -> tuple[int, int, int]:
    spec = resolve(parse(recipe))
    parts = place(build(spec), spec)
    named = [(name, p) for name, p in parts.predictor.named_parameters() if name in parts.trainable]
    optimizer = parts.make_optimizer([ParamGroup(named, {})])
    parts.before_update(True)
    here = [param for _, param in named if not is_part(param, "fsdp")]
    if here:
        sum(
            param.to_local().sum() if isinstance(param, DTensor) else param.sum() for param in here
        ).backward()
    for _, param in named:
        param.grad = param.grad if param.grad is not None else torch.zeros_like(param)
    optimizer.step()
    params = sum(held(p).nbytes for p in parts.predictor.parameters())
    return params, sum(held(p.grad).nbytes for _, p in named), state_bytes(optimizer)


@pytest.mark.parametrize("world", [4, 3])
def test_real_ranks_hold_what_is_planned(world):
    cases = {
        name: parallel for name, parallel in CASES.items() if (3 if name == "tp 3 x zero3" else 4) == world
    }
    adapter = {"use": "lora", "rank": 3}
    extra = [({"adapter": adapter}, [{"use": "tp"}, {"use": "zero3"}]), *OPTIMIZERS] if world == 4 else []
    runs = [({}, parallel) for parallel in cases.values()] + extra
    got = on_ranks(world, held_after_a_step, [text(p, world, plan=False, **c) for c, p in runs])
    for number, (changes, parallel) in enumerate(runs):
        layout = Layout(plan_of(parallel, world, **changes))
        planned = [layout.state_bytes(rank) for rank in range(world)]
        assert planned == [by_case[number] for by_case in got], parallel


def test_what_is_offloaded_is_not_on_the_device():
    plain, state, all_of_it = (
        Layout(plan_of([], 1, optimizer={"use": "adamw-8bit", "offload": offload})).state_bytes(0)
        for offload in (False, "state", True)
    )
    assert plain[2] > 0
    assert state == (*plain[:2], 0)
    assert all_of_it[0] == plain[0]
    assert 0 < all_of_it[1] < plain[1] / 10  # the largest gradient
    assert all_of_it[2] == 0


def held_of_64(recipe: str, rank: int) -> tuple[dict[str, tuple[int, ...]], tuple[int, int, int]]:
    """Return what one of 64 ranks has, the only one that there is: the local shapes of all parameters, and
    the bytes of these, of gradients and of the optimizer's state.
    """
    import os

    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "64"}
    dist.init_process_group("fake", rank=rank, world_size=64, store=FakeStore())
    spec = resolve(parse(recipe))
    parts = build(spec)
    parts = parts.task.prepare(parts, spec)
    for choice in sorted(spec.parallel, key=lambda choice: choice.config.stage):
        parts = choice.build(Deps(spec)).apply(parts)
    parts.trained.to_empty(device="cpu")
    named = [(name, p) for name, p in parts.predictor.named_parameters() if name in parts.trainable]
    optimizer = parts.make_optimizer([ParamGroup(named, {})])
    for _, param in named:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    shapes = {name: tuple(held(p).shape) for name, p in parts.predictor.named_parameters()}
    sizes = [
        sum(held(p).nbytes for p in found) for found in ([p for _, p in named], [p.grad for _, p in named])
    ]
    return shapes, (*sizes, state_bytes(optimizer))


MIDDLE = {"num_layers": 12, "num_heads": 6, "head_dim": 64, "temb_dim": 100, "text_dim": 12}


@pytest.mark.parametrize(
    "parallel",
    [
        [{"use": "zero3"}],
        [{"use": "tp", "size": 4, "sequence": True}, {"use": "pp", "size": 4}, {"use": "zero3"}],
        [
            {"use": "tp", "size": 2},
            {"use": "cp", "ulysses": 2, "ring": 2},
            {"use": "layerzero", "zero3_size": 4},
        ],
    ],
)
def test_64_ranks_hold_what_is_planned(parallel):
    layout = Layout(plan_of(parallel, 64, **MIDDLE))
    for rank in (5, 63):
        [(shapes, sizes)] = on_ranks(1, held_of_64, text(parallel, 64, plan=False, **MIDDLE), rank)
        assert {name: part.shape for name, part in layout.all_held(rank).items()} == shapes
        assert layout.state_bytes(rank) == sizes


def test_what_is_shared_out_adds_up():
    layout = Layout(plan_of([{"use": "tp"}, {"use": "pp", "size": 2}, {"use": "zero3"}], 32))
    whole = sum(torch.Size(shape).numel() for shape in layout.shapes.values())
    found = sum(part.bytes for rank in range(32) for part in layout.all_held(rank).values())
    twice = sum(torch.Size(shape).numel() for name, shape in layout.shapes.items() if not layout.is_tp(name))
    assert found == 4 * (whole + twice)
