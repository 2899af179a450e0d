"""layerzero: one process's results; parameters gathered inside a group, optimizer state over all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from cvx_core import RecipeError, resolve
from cvx_core.building import build
from cvx_core.interfaces import ParamGroup, Parts
from cvx_core.placing import place
from cvx_core.recipe import parse
from cvx_parallel.gradients import clip
from cvx_parallel.sliced import state_bytes
from tests.distributed import matrix
from tests.distributed.counting import counted
from tests.distributed.harness import on_ranks
from tests.distributed.matrix import compare_all, recipe

LAYERZERO = {"use": "layerzero", "zero3_size": 2}


def test_alone():
    ignoring = {**LAYERZERO, "ignored_modules": ["patch_embed", "transformer_blocks.1.norm1"]}
    without_groups = {**LAYERZERO, "zero3_size": 1, "forward_prefetch": False}
    cases = [("1.0-t2v", [LAYERZERO]), ("1.5-i2v", [ignoring]), ("2b", [without_groups])]
    compare_all(cases, world=4, layers=2)


def made(text: str) -> tuple[Parts, Any, list[tuple[str, torch.Tensor]], torch.optim.Optimizer]:
    spec = resolve(parse(text))
    parts = place(build(spec), spec)
    matrix.randomise(parts)
    named = matrix._trainable(parts)
    assert parts.make_optimizer is not None
    return parts, spec, named, parts.make_optimizer([ParamGroup(named, {})])


def steps(text: str, count: int, accumulate: int = 1) -> dict[str, Any]:
    """Train for some steps; return losses, whole parameters and their bytes, and what was sent and kept."""
    parts, spec, named, optimizer = made(text)
    losses, groups = [], []
    with counted() as sent:
        for number in range(count):
            for k in range(accumulate):
                parts.before_update(k == accumulate - 1)
                features, draws = matrix._share(parts, spec, number * accumulate + k)
                losses.append(float(matrix._mean(parts.forward_backward(features, draws), parts)))
            issued = len(sent)
            clip([p for _, p in named], 1.0, parts.mesh)
            after_backward = len(sent)
            optimizer.step()
            optimizer.zero_grad()
            groups.append((sent[:issued], sent[after_backward:]))
            sent.clear()
    return {
        "losses": losses,
        "parameters": {name: matrix.whole(p) for name, p in named},
        "bytes": sum(p.numel() * p.element_size() for _, p in named),
        "kept": state_bytes(optimizer),
        "held": sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for _, p in named),
        "passes": groups[-1][0],
        "update": groups[-1][1],
    }


def several(texts: list[str], count: int) -> list[dict[str, Any]]:
    return [steps(text, count) for text in texts]


@pytest.fixture(scope="module")
def runs() -> list[list[dict[str, Any]]]:
    """Ten steps under layerzero and under zero3, by rank."""
    parallel = ([LAYERZERO], [{"use": "zero3"}])
    return on_ranks(4, several, [recipe("1.0-t2v", item, "float64", layers=2) for item in parallel], 10)


@pytest.fixture(scope="module")
def ten_steps(runs) -> list[dict[str, Any]]:
    return [mine for mine, _ in runs]


def test_ten_steps_are_those_of_zero3(runs):
    for mine, other in runs:
        assert mine["losses"] == pytest.approx(other["losses"], rel=1e-10)
        for name, value in other["parameters"].items():
            torch.testing.assert_close(mine["parameters"][name], value, rtol=0, atol=1e-9)


def test_optimizer_state_is_shared_out_over_all_data_ranks(ten_steps):
    """Two moments of every parameter, over 4 ranks; parameters over the 2 of a group."""
    for rank in ten_steps:
        assert rank["kept"] == 2 * rank["bytes"] / 4
        assert rank["held"] == rank["bytes"] / 2


def test_all_gathers_cross_no_group_boundary(ten_steps):
    """Forward and backward gather parameters inside a group; groups exchange gradients and updates once."""
    for number, rank in enumerate(ten_steps):
        group, others = ((0, 1), (2, 3))[number // 2], ((0, 2), (1, 3))[number % 2]
        gathers = [item for item in rank["passes"] + rank["update"] if item.kind == "all_gather"]
        assert {item.ranks for item in gathers} == {group}
        root = sum(item.size for item in gathers) - 2 * rank["bytes"]
        assert -rank["bytes"] < root <= 0  # the root's parameters stay gathered from forward to backward
        total = {"reduce_scatter": (group, rank["bytes"]), "all_reduce": (others, rank["bytes"] / 2)}
        for kind, (ranks, size) in total.items():
            found = [item for item in rank["passes"] if item.kind == kind and item.ranks != (0, 1, 2, 3)]
            assert {item.ranks for item in found} == {ranks}
            assert sum(item.size for item in found) == size, kind
        assert {(item.kind, item.ranks) for item in rank["update"]} == {("broadcast", others)}
        assert sum(item.size for item in rank["update"]) == rank["bytes"] / 2


def test_accumulated_batches_exchange_gradients_once():
    text = recipe("1.0-t2v", [LAYERZERO], "float64", layers=2)
    for rank in on_ranks(4, steps, text, 1, 3):
        scattered = sum(item.size for item in rank["passes"] if item.kind == "reduce_scatter")
        assert scattered == rank["bytes"]


def test_precisions():
    """Blocks are computed in bfloat16; what is kept, summed and updated is float32."""
    fields = {**LAYERZERO, "param_dtype": "bf16", "reduce_dtype": "fp32"}
    texts = [recipe("1.5-i2v", [item], "float32", layers=2) for item in (fields, LAYERZERO)]
    for mine, other in on_ranks(4, several, texts, 2):
        assert mine["losses"] == pytest.approx(other["losses"], rel=2e-2)
        assert mine["losses"] != other["losses"]
        assert all(value.dtype == torch.float32 for value in mine["parameters"].values())
        sizes = [
            sum(item.size for item in rank["passes"] if item.kind == "all_gather") for rank in (mine, other)
        ]
        assert sizes[0] * 2 == sizes[1]


def gathered(text: str) -> list[int]:
    """Return how many blocks are there, or on their way, when the gradients of each one are."""
    parts, spec, _, _ = made(text)
    found: list[int] = []

    def there(_gradient: torch.Tensor) -> None:
        groups = [block._get_fsdp_state()._fsdp_param_group for block in parts.blocks]
        found.append(sum(group.is_unsharded or group._all_gather_result is not None for group in groups))

    def noting(run: Any) -> Any:
        def noted(body: Any, tokens: Any) -> Any:
            tokens.video.register_hook(there)
            return run(body, tokens)

        return noted

    for block in parts.blocks:
        block.run = noting(block.run)
    parts.before_update(True)
    parts.forward_backward(*matrix._share(parts, spec, 0))
    return found


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize(("when", "blocks"), [("BACKWARD_PRE", [2, 2, 1]), ("BACKWARD_POST", [1, 1, 1])])
def test_the_next_block_is_gathered_while_one_is_computed_or_after_it(when, blocks, forward):
    fields = {**LAYERZERO, "backward_prefetch": when, "forward_prefetch": forward}
    for found in on_ranks(2, gathered, recipe("1.0-t2v", [fields], "float64", layers=3)):
        assert found == blocks


def test_when_blocks_are_gathered_changes_nothing():
    fields = {**LAYERZERO, "backward_prefetch": "BACKWARD_POST", "limit_all_gathers": True}
    compare_all([("1.0-t2v", [{**fields, "ignored_modules": None}])], world=4, layers=2)


def state(text: str) -> dict[str, Any]:
    """Return the optimizer's state after two steps, whole, by the names that checkpoints have."""
    parts, spec, _, optimizer = made(text)
    for number in range(2):
        parts.before_update(True)
        parts.forward_backward(*matrix._share(parts, spec, number))
        parts.after_backward()
        optimizer.step()
        optimizer.zero_grad()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    _, packed = get_state_dict(parts.predictor, optimizer, options=options)
    return {
        key: matrix.whole(value) if isinstance(value, torch.Tensor) else value
        for key, value in packed.items()
    }


@pytest.mark.parametrize(
    ("parallel", "world"),
    [([LAYERZERO], 4), ([{"use": "zero1"}], 2), ([{"use": "zero1"}, {"use": "tp"}], 4)],
    ids=["layerzero", "zero1", "zero1-tp"],
)
def test_checkpoints_have_the_names_shapes_and_values_of_one_process(parallel, world):
    ranks = on_ranks(world, state, recipe("1.0-t2v", parallel, "float64", layers=2))
    alone = state(recipe("1.0-t2v", [], "float64", layers=2))
    for rank in ranks:
        assert rank.keys() == alone.keys()
        for key, value in alone.items():
            if isinstance(value, torch.Tensor):
                assert matrix.relative(rank[key], value, 1e-9) < 1e-6, key
            else:
                assert rank[key] == value, key


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"ignored_modules": ["patch_embd"]},
            "no module 'patch_embd' with parameters. Did you mean 'patch_embed'?",
        ),
        ({"ignored_modules": ["tables"]}, "no module 'tables'"),
        ({"size": 6, "zero3_size": 4}, "zero3_size 4 does not divide size 6; 3 would"),
        (
            {"size": 12, "zero3_size": None},
            "zero3_size 8, which it is where it is not stated, does not divide",
        ),
        ({"param_dtype": "float16"}, "param_dtype: is float16, in which small gradients vanish"),
        ({"param_dtype": "fp8"}, "param_dtype: got 'fp8'; expected 'float32', 'bfloat16' or 'float16'"),
        ({"backward_prefetch": "BACKWARD"}, "Did you mean 'BACKWARD_PRE'"),
        ({"limit_all_gathers": False}, "limit_all_gathers: no more blocks are gathered ahead than"),
        (
            {"ignored_modules": ["text_encoder"]},
            "'text_encoder' is a model of its own here, which every rank keeps",
        ),
        ({"autocast_output": True}, "'layerzero' has no such field: the loss is computed in float32"),
        ({"autocast_input": True}, "'layerzero' has no such field: a predictor takes its inputs"),
        ({"buffer_dtype": None}, "'layerzero' has no such field: models of cvx keep no buffers"),
        ({"offload_grads": False}, "'layerzero' has no such field: gradients stay on the device"),
        (
            {"backward_reduce_scatter": "BACKWARD_PRE"},
            "'layerzero' has no such field: the gradients of a block",
        ),
        ({"zero3_sise": 4}, "Did you mean 'zero3_size'"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(RecipeError) as error:
        resolve(parse(recipe("1.0-t2v", [{**LAYERZERO, **fields}], "float32")))
    assert message in str(error.value)


def test_nothing_to_share_out_in_a_task_without_training():
    data = yaml.safe_load(recipe("1.0-t2v", [LAYERZERO], "float32")) | {"task": {"use": "evaluate"}}
    del data["optimizer"]
    with pytest.raises(RecipeError, match="trains nothing"):
        resolve(parse(yaml.safe_dump(data)))
