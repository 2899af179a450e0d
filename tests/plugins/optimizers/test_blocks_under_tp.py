"""adamw-8bit beside tp: blocks that ranks would cut are refused by the check, with what would do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvx_core import RecipeError, resolve
from cvx_core.recipe import parse
from cvx_plugins.optimizers.adamw_config import BLOCKS, fits, parts
from tests.distributed.test_wrong_meshes import TRAIN, recipe


def refused(heads, head_dim, block, entries, world=None, adapter=""):
    predictor = TRAIN.replace("num_heads: 3, head_dim: 16", f"num_heads: {heads}, head_dim: {head_dim}")
    optimizer = f"optimizer: {{use: adamw-8bit, block: {block}}}\n{adapter}"
    try:
        resolve(parse(recipe(entries, predictor + optimizer)), world=world)
    except RecipeError as error:
        return [problem.message for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("heads", "head_dim", "block", "ranks", "says"),
    [
        (48, 64, 256, 4, None),
        (48, 64, 256, 8, "256 does not divide the 384 values of each row of 3072 that one of 8 ranks of tp "),
        (48, 64, 128, 8, None),
        (30, 64, 256, 2, "256 does not divide the 960 values of each row of 1920"),
        (30, 64, 64, 2, None),
        (3, 64, 256, 2, "each row of 192 that one of 2 ranks of tp holds. No block does. Use adamw."),
        (3, 64, 64, 2, "No block does. Use tp.size 3, or adamw."),
        (3, 16, 256, 1, None),
    ],
)
def test_what_ranks_hold_of_a_row_is_whole_blocks(heads, head_dim, block, ranks, says):
    found = refused(heads, head_dim, block, ["ddp", f"tp, size: {ranks}"])
    assert len(found) == (says is not None)
    assert says is None or says in found[0]


@pytest.mark.parametrize(("heads", "ranks", "block"), [(48, 8, 128), (30, 2, 64), (20, 5, 256), (24, 8, 64)])
def test_a_block_that_does_is_proposed_and_passes(heads, ranks, block):
    [message] = refused(heads, 64, 256, ["ddp", f"tp, size: {ranks}"]) or [f"Use block: {block}."]
    assert message.endswith(f"Use block: {block}.")
    assert refused(heads, 64, block, ["ddp", f"tp, size: {ranks}"]) == []


def test_meshes_that_are_proposed_cut_no_block():
    [message] = refused(12, 64, 256, ["ddp", "tp, size: 3"], world=8)
    assert message.endswith("Set tp.size to 1, or start 6 or 9 processes.")
    assert refused(12, 64, 256, ["ddp", "tp, size: 3"], world=9) == []


def test_of_factors_a_run_finds_out():
    assert refused(3, 64, 256, ["tp, size: 2"], adapter="adapter: {use: lora, rank: 4}\n") == []


@given(st.integers(1, 5000), st.integers(1, 16))
def test_parts_are_those_of_torch(width, ranks):
    chunks = [len(chunk) for chunk in torch.empty(width).chunk(ranks)]
    assert parts(width, ranks) == [*chunks, *[0] * (ranks - len(chunks))]
    assert all(fits(width, block) == (width < 64 or width % block == 0) for block in BLOCKS)
