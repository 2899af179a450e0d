"""Names tables: matching, cutting and joining, both directions, and what is refused."""

import re
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cvx_core import FormatError, PluginError
from cvx_core.interfaces import TensorInfo, Tensors
from cvx_core.testing.format import as_tensors
from cvx_io.rename import IDENTITY, Cat, Chunks, Drop, Names, Rename
from cvx_io.tensors.pickles import as_tensors as as_stored
from cvx_io.tensors.pickles import load_pickle

LAYER, BLOCK = "transformer.layers.{i}", "transformer_blocks.{i}"
ADALN = "mixins.adaln_layer"
SAT = Names(
    prefix="model.diffusion_model.",
    rules=(
        Rename("time_embed.0.{p}", "time_embedding.linear_1.{p}"),
        Rename("time_embed.2.{p}", "time_embedding.linear_2.{p}"),
        Rename("mixins.patch_embed.{rest}", "patch_embed.{rest}"),
        Drop("mixins.pos_embed.freqs_{x}", "recomputed when used"),
        Drop("transformer.position_embeddings.{p}", "left over from the base model"),
        Chunks(
            f"{ADALN}.adaLN_modulations.{{i}}.1.{{p}}",
            parts=12,
            into={
                f"{BLOCK}.norm1.linear.{{p}}": (0, 1, 2, 6, 7, 8),
                f"{BLOCK}.norm2.linear.{{p}}": (3, 4, 5, 9, 10, 11),
            },
        ),
        Rename(f"{ADALN}.query_layernorm_list.{{i}}.{{p}}", f"{BLOCK}.attn1.norm_q.{{p}}"),
        Rename(f"{ADALN}.key_layernorm_list.{{i}}.{{p}}", f"{BLOCK}.attn1.norm_k.{{p}}"),
        Rename(f"{LAYER}.input_layernorm.{{p}}", f"{BLOCK}.norm1.norm.{{p}}"),
        Rename(f"{LAYER}.post_attention_layernorm.{{p}}", f"{BLOCK}.norm2.norm.{{p}}"),
        Cat(f"{LAYER}.attention.query_key_value.{{p}}", [f"{BLOCK}.attn1.to_{x}.{{p}}" for x in "qkv"]),
        Rename(f"{LAYER}.attention.dense.{{p}}", f"{BLOCK}.attn1.to_out.0.{{p}}"),
        Rename(f"{LAYER}.mlp.dense_h_to_4h.{{p}}", f"{BLOCK}.ff.net.0.proj.{{p}}"),
        Rename(f"{LAYER}.mlp.dense_4h_to_h.{{p}}", f"{BLOCK}.ff.net.2.{{p}}"),
        Rename("transformer.final_layernorm.{p}", "norm_final.{p}"),
        Rename("mixins.final_layer.norm_final.{p}", "norm_out.norm.{p}"),
        Rename("mixins.final_layer.adaLN_modulation.1.{p}", "norm_out.linear.{p}"),
        Rename("mixins.final_layer.linear.{p}", "proj_out.{p}"),
    ),
)

ABC = Names(
    (Cat("abc.{i}", ["a.{i}", "b.{i}", "c.{i}"]), Rename("d", "e"), Drop("junk.{rest}", "not needed"))
)


def forward(names, foreign):
    return dict(names.read(as_tensors(foreign)).read())


def backward(names, canonical):
    return dict(names.write(as_tensors(canonical)).read())


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


@pytest.fixture(scope="module")
def sat_and_hf(shared):
    folder = shared / "fixtures/sat/t2v_5b"
    sat = dict(as_stored(load_pickle(folder / "transformer/1/mp_rank_00_model_states.pt")["module"]).read())
    hf = load_file(folder / "hf/transformer/diffusion_pytorch_model.safetensors")
    return sat, {name: tensor.float() for name, tensor in hf.items()}


def test_a_table_is_imported_without_torch():
    code = "import sys, cvx_io.rename; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_sat_file_becomes_the_reference_conversion_exactly(sat_and_hf):
    sat, hf = sat_and_hf
    assert_equal(forward(SAT, sat), hf)


def test_reference_conversion_becomes_the_sat_file_exactly(sat_and_hf):
    sat, hf = sat_and_hf
    kept = {name: tensor for name, tensor in sat.items() if not re.search("freqs_|position_emb", name)}
    assert len(kept) == len(sat) - 3
    assert_equal(backward(SAT, hf), kept)


def test_index_is_translated_without_data(sat_and_hf):
    sat, hf = sat_and_hf
    infos = {name: TensorInfo(tuple(tensor.shape), "float32") for name, tensor in sat.items()}
    expected = {name: TensorInfo(tuple(tensor.shape), "float32") for name, tensor in hf.items()}
    assert SAT.plan(sat).index(infos) == expected


def test_dropped_names_carry_their_reason(sat_and_hf):
    sat, _ = sat_and_hf
    dropped = SAT.plan([*sat, "first_stage_model.encoder.weight"]).dropped
    prefix = "model.diffusion_model."
    assert dropped == {
        f"{prefix}mixins.pos_embed.freqs_sin": "recomputed when used",
        f"{prefix}mixins.pos_embed.freqs_cos": "recomputed when used",
        f"{prefix}transformer.position_embeddings.weight": "left over from the base model",
        "first_stage_model.encoder.weight": "does not start with 'model.diffusion_model.'",
    }


def test_a_tensor_is_read_with_its_group_only():
    asked = []
    foreign = as_tensors({"d": torch.ones(1), "abc.0": torch.ones(3), "abc.1": torch.arange(3)})
    source = replace(foreign, load=lambda name: asked.append(name) or foreign.load(name))
    tensors = ABC.read(source)
    assert_equal(dict(tensors.read(["b.1", "c.1"])), {"b.1": torch.tensor([1]), "c.1": torch.tensor([2])})
    assert asked == ["abc.1"]
    assert tensors.origins["b.1"] == ["abc.1"]


def test_an_unknown_name_is_refused():
    with pytest.raises(FormatError, match=r"no tensor 'b\.2'\. Did you mean 'b\.1'\?"):
        list(ABC.read(as_tensors({"abc.1": torch.ones(3)})).read(["b.2"]))


def test_first_matching_rule_decides():
    names = Names((Rename("net.layer{i}.{rest}", "blocks.{i}.{rest}"), Rename("net.{rest}", "{rest}")))
    foreign = {"net.layer10.up.weight": torch.ones(1), "net.layers": torch.zeros(1)}
    canonical = forward(names, foreign)
    assert list(canonical) == ["blocks.10.up.weight", "layers"]
    assert_equal(backward(names, canonical), foreign)


def test_numbers_match_digits_only_and_fields_one_component():
    names = Names((Rename("x.{i}.{p}", "y.{i}.{p}"),))
    for name in ("x.a.weight", "x.1.weight.data", "x.1.", "zx.1.weight"):
        with pytest.raises(FormatError, match="no rule matches 1 of the names"):
            names.plan([name])


def test_a_field_used_twice_must_agree():
    names = Names((Rename("{p}.{p}", "{p}"),))
    assert names.plan(["a.a"]).steps[0].targets == {"a": (0,)}
    with pytest.raises(FormatError):
        names.plan(["a.b"])


def test_unmatched_names_are_counted_with_the_nearest_rule():
    wrong = [f"model.diffusion_model.transformer.layers.{i}.attn.dense.weight" for i in range(5)]
    with pytest.raises(FormatError) as caught:
        SAT.plan(wrong, "x.pt")
    message = str(caught.value)
    assert message.startswith("x.pt: no rule matches 5 of the names")
    assert "and 2 more" in message
    assert "'model.diffusion_model.transformer.layers.{i}.attention.dense.{p}'" in message


def test_unmatched_canonical_names_are_refused():
    with pytest.raises(FormatError, match="no rule matches 1 of the names: 'z'"):
        ABC.plan_reverse(["e", "z"])


def test_a_file_of_something_else_is_refused():
    with pytest.raises(FormatError, match="holds nothing of this model"):
        SAT.plan(["conditioner.weight"])
    with pytest.raises(FormatError, match="not needed"):
        ABC.plan(["junk.x"])


def test_a_name_produced_twice_is_refused():
    names = Names((Rename("rope.table", "table"), Rename("pos.table", "table")))
    assert forward(names, {"pos.table": torch.ones(1)}) == {"table": torch.ones(1)}
    with pytest.raises(
        FormatError, match=r"'table' would be produced twice, from 'pos\.table' and 'rope\.table'"
    ):
        names.plan(["pos.table", "rope.table"])


def test_an_incomplete_group_is_refused():
    with pytest.raises(FormatError, match=r"has 'a\.0', 'c\.0' but not 'b\.0'"):
        ABC.plan_reverse(["a.0", "c.0", "e"])


@pytest.mark.parametrize("other", [torch.ones(2, 3), torch.ones(1, 4), torch.ones(1, 3).half()])
def test_parts_that_differ_are_not_joined(other):
    group = {"a.0": torch.ones(1, 3), "b.0": torch.ones(1, 3), "c.0": other}
    with pytest.raises(FormatError, match="differ in shape or dtype"):
        backward(ABC, group)


@pytest.mark.parametrize("tensor", [torch.ones(4, 3), torch.tensor(1.0)])
def test_a_tensor_that_cannot_be_cut_is_refused(tensor):
    with pytest.raises(FormatError, match=r"'abc\.0' has shape .* 3 equal parts"):
        forward(ABC, {"abc.0": tensor})


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (Rename("a.{i}", "b"), "needs the fields"),
        (Cat("a.{i}", ["b.{i}", "c.{j}"]), "needs the fields"),
        (Chunks("a", 3, {"b": (0, 1)}), r"list parts \[0, 1\]"),
        (Chunks("a", 2, {"b": (0, 1), "c": (1,)}), r"list parts \[0, 1, 1\]"),
    ],
)
def test_a_rule_without_a_reverse_is_the_plugins_fault(rule, why):
    with pytest.raises(PluginError, match=why):
        Names((rule,))


def test_only_the_last_group_is_held():
    alive = []

    def load(name):
        tensor = torch.ones(1)
        alive.append(weakref.ref(tensor))
        return tensor

    info = TensorInfo((1,), "float32")
    source = Tensors({f"{part}.{i}": info for i in range(50) for part in "abc"}, load)
    for _name, _tensor in ABC.write(source).read():
        assert sum(ref() is not None for ref in alive) <= 3
    assert len(alive) == 150


@st.composite
def tables(draw):
    """A table of random chunk rules, with a canonical state that fits it."""
    rules, state = [], {}
    for number in range(draw(st.integers(1, 4))):
        parts = draw(st.integers(1, 6))
        order = draw(st.permutations(range(parts)))
        cuts = sorted(draw(st.sets(st.integers(1, parts - 1)))) if parts > 1 else []
        groups = [tuple(order[a:b]) for a, b in zip([0, *cuts], [*cuts, parts], strict=True)]
        into = {f"c{number}.{k}.{{i}}.{{p}}": group for k, group in enumerate(groups)}
        rules.append(Chunks(f"f{number}.{{i}}.{{p}}", parts, into))
        rows = draw(st.integers(1, 3))
        for i in range(draw(st.integers(1, 3))):
            for k, group in enumerate(groups):
                state[f"c{number}.{k}.{i}.weight"] = torch.rand(rows * len(group), 2)
    return Names(tuple(rules), prefix=draw(st.sampled_from(["", "model."]))), state


@given(tables(), st.randoms())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_table_is_a_bijection_in_any_order(table, random):
    names, state = table
    items = list(state.items())
    random.shuffle(items)
    foreign = backward(names, dict(items))
    assert sum(map(torch.numel, foreign.values())) == sum(map(torch.numel, state.values()))
    assert_equal(forward(names, foreign), state)
    assert_equal(backward(names, forward(names, foreign)), foreign)


@given(st.dictionaries(st.text(min_size=1), st.just(torch.ones(1)), max_size=5))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_identity_changes_nothing(state):
    assert forward(IDENTITY, state) == state
    assert backward(IDENTITY, state) == state
