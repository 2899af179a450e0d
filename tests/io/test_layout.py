"""Sharing tensors among ranks and stages: what is split joins to the same; wrong grids are refused."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvx_core import FormatError
from cvx_core.interfaces import TensorInfo
from cvx_io.layout import Part, assemble, join, join_info, split, split_info, stages_of
from cvx_io.pieces import describe
from cvx_io.rename import Cat, Names, Rename

NAMES = Names(
    blocks="layers.",
    last=("head.",),
    rules=(
        Cat("layers.{i}.qkv", ["b.{i}.q", "b.{i}.k", "b.{i}.v"], tp="per_part"),
        Rename("layers.{i}.up", "b.{i}.up", tp="column"),
        Rename("layers.{i}.down", "b.{i}.down", tp="row"),
        Rename("head.mod", "mod", tp="column", whole=(2, "head.norm")),
        Rename("{rest}", "{rest}"),
    ),
)


@given(
    st.sampled_from(["column", "row", "per_part", None]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 5),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_split_joins_to_the_same(how, parts, world, size, cut):
    tensor = torch.arange(parts * world * size * world * 2).reshape(parts * world * size, world * 2)
    shards = [torch.cat(split(tensor.split(cut), how, parts, rank, world)) for rank in range(world)]
    info = split_info("x", describe(tensor), how, parts, world)
    assert {describe(shard) for shard in shards} == {info}
    assert join_info(info, how, world) == describe(tensor)
    assert torch.equal(torch.cat(list(join(shards, how, parts))), tensor)


def test_fused_parts_are_cut_one_by_one():
    qkv = torch.arange(12)
    assert torch.cat(split([qkv], "per_part", 3, 0, 2)).tolist() == [0, 1, 4, 5, 8, 9]
    assert torch.cat(split([qkv], "column", 3, 0, 2)).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("how", "shape"), [("column", (5, 4)), ("row", (4, 5)), ("per_part", (8, 4)), ("row", (4,))]
)
def test_a_tensor_that_does_not_divide_is_refused(how, shape):
    with pytest.raises(FormatError, match=r"'x' .* cannot be split over tp=2"):
        split_info("x", TensorInfo(shape, "float32"), how, 3, 2)


def rank(state):
    return {
        name: Part(describe(tensor), partial(lambda held: held, tensor)) for name, tensor in state.items()
    }


def stage(blocks, value=0.0, **extra):
    state = {f"layers.{i}.up": torch.full((2, 2), value + i) for i in range(blocks)}
    return rank({**state, **{name.replace("_", "."): tensor for name, tensor in extra.items()}})


def test_blocks_are_numbered_through_the_stages():
    grid = [[stage(2, 0.0, embed=torch.ones(1))], [stage(1, 10.0)], [stage(1, 20.0, head_norm=torch.ones(2))]]
    whole = assemble(grid, NAMES, "x")
    assert [float(whole.load(f"layers.{i}.up")[0, 0]) for i in range(4)] == [0.0, 1.0, 10.0, 20.0]
    assert {"embed", "head.norm"} < whole.index.keys()


def test_a_stage_with_a_gap_is_refused():
    broken = {name: part for name, part in stage(3).items() if ".1." not in name}
    with pytest.raises(FormatError, match=r"x: stage 1 lacks its blocks \[1\]"):
        assemble([[stage(1)], [broken]], NAMES, "x")


def test_ranks_must_hold_the_same_names_and_shapes():
    with pytest.raises(FormatError, match=r"ranks 0 and 1 of stage 0 hold different names: 'head\.norm'"):
        assemble([[stage(1, head_norm=torch.ones(2)), stage(1)]], NAMES, "x")
    with pytest.raises(FormatError, match=r"'embed' is .* on tensor-parallel rank 1 of stage 0, but"):
        assemble([[stage(1, embed=torch.ones(2)), stage(1, embed=torch.ones(3))]], NAMES, "x")


def test_replicas_that_differ_are_refused_unless_the_first_is_asked_for():
    grid = [[stage(1, embed=torch.zeros(2)), stage(1, embed=torch.ones(2))]]
    with pytest.raises(FormatError, match=r"x: the copies of 'embed' differ.*replicas=first"):
        assemble(grid, NAMES, "x").load("embed")
    assert torch.equal(assemble(grid, NAMES, "x", replicas_must_agree=False).load("embed"), torch.zeros(2))


def test_a_copy_in_a_later_stage_is_compared_and_reported():
    def grid(last):
        return [[stage(1, embed=torch.zeros(2))], [stage(1, embed=last)]]

    whole = assemble(grid(torch.zeros(2)), NAMES, "x")
    assert whole.dropped == {"embed (stage 1)": "an earlier stage holds it too"}
    assert torch.equal(whole.load("embed"), torch.zeros(2))
    with pytest.raises(FormatError, match="the copies of 'embed' differ"):
        assemble(grid(torch.ones(2)), NAMES, "x").load("embed")


def test_older_files_that_hold_a_tensor_whole_are_known_by_its_rows():
    ranks = [rank({"head.norm": torch.ones(3), "head.mod": torch.arange(6.0)}) for _ in range(2)]
    assert torch.equal(assemble([ranks], NAMES, "x").load("head.mod"), torch.arange(6.0))
    halves = [rank({"head.norm": torch.ones(3), "head.mod": half}) for half in torch.arange(6.0).chunk(2)]
    assert torch.equal(assemble([halves], NAMES, "x").load("head.mod"), torch.arange(6.0))


def test_stages_take_their_blocks_and_ends():
    names = ["embed", "head.norm", *(f"layers.{i}.up" for i in range(3))]
    assert stages_of(NAMES, names, [1, 2]) == [
        {"embed": "embed", "layers.0.up": "layers.0.up"},
        {"head.norm": "head.norm", "layers.0.up": "layers.1.up", "layers.1.up": "layers.2.up"},
    ]
    with pytest.raises(FormatError, match=r"pp sizes \[1, 1\] sum to 2, but the model has 3 layers"):
        stages_of(NAMES, names, [1, 1])
