"""LoRA tensors: alphas, fusing and unfusing, merging, and the comparison that guards conversions."""

import math
from pathlib import Path

import pytest
import torch

from cvx_core import FormatError
from cvx_core.interfaces import Tensors
from cvx_core.testing.format import as_tensors
from cvx_io.lora import compare, fuse, is_lora, merge, modules, stating, unfuse, with_alpha
from cvx_io.rename import Names, Rename
from cvx_io.tensors.safetensors import open_safetensors

QKV = {"b.{i}.to_qkv": ["b.{i}.to_q", "b.{i}.to_k", "b.{i}.to_v"]}


def lora(seed=0, dtype=torch.float32, size=(6, 4), **ranks_and_alphas):
    """Return the tensors of modules b.0.to_<key>: rank and alpha, or rank alone."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for part, value in ranks_and_alphas.items():
        rank, alpha = value if isinstance(value, tuple) else (value, None)
        state[f"b.0.to_{part}.lora_A.weight"] = torch.randn(rank, size[0], generator=generator).to(dtype)
        state[f"b.0.to_{part}.lora_B.weight"] = torch.randn(size[1], rank, generator=generator).to(dtype)
        if alpha is not None:
            state[f"b.0.to_{part}.alpha"] = torch.tensor(float(alpha))
    return state


def delta(state, module, dtype=torch.float64):
    a, b = state[f"{module}.lora_A.weight"].to(dtype), state[f"{module}.lora_B.weight"].to(dtype)
    return state[f"{module}.alpha"].to(dtype) / a.shape[0] * (b @ a)


def read(tensors):
    return dict(tensors.read())


# Which files are LoRAs


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.lora_A.weight", "a.lora_B.weight"], True),
        (["base_model.model.a.lora_A.default.weight", "base_model.model.a.lora_B.default.weight"], True),
        (["lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", "lora_unet_a.alpha"], True),
        (["a.lora_A.weight", "a.lora_B.weight", "a.lora_magnitude_vector", "a.dora_scale"], True),
        (["a.lora_A.weight", "a.lora_B.weight", "a.weight"], False),
        (["a.weight"], False),
        (["a.alpha"], False),
        ([], False),
    ],
)
def test_a_lora_is_told_by_its_names(names, expected):
    assert is_lora(names) is expected


# Alphas


def test_a_stated_alpha_wins_and_a_given_one_fills_the_rest():
    state = lora(q=(2, 5), k=3)
    found = with_alpha(as_tensors(state), 5)
    assert {name: float(found.load(name)) for name in found.index if name.endswith("alpha")} == {
        "b.0.to_q.alpha": 5,
        "b.0.to_k.alpha": 5,
    }
    assert found.index["b.0.to_k.alpha"] == ((), "float32")
    assert found.origins == {"b.0.to_k.alpha": []}
    assert all(torch.equal(found.load(name), tensor) for name, tensor in state.items())
    stated = with_alpha(as_tensors(lora(q=(2, 5), k=(3, 1))), None)
    assert [float(stated.load(f"b.0.to_{part}.alpha")) for part in "qk"] == [5, 1]


def test_an_alpha_is_never_guessed():
    with pytest.raises(FormatError, match=r"x.pt: states no alpha for 1 modules: 'b.0.to_k'.*--alpha"):
        with_alpha(as_tensors(lora(q=(2, 5), k=3)), None, "x.pt")


def test_two_different_alphas_are_refused():
    with pytest.raises(FormatError, match=r"x.pt: 'b.0.to_q' has alpha 5 in the file, but 4 was given"):
        with_alpha(as_tensors(lora(q=(2, 5))), 4, "x.pt")
    with_alpha(as_tensors(lora(q=(2, 0.1))), 0.1)  # the same number in single precision


@pytest.mark.parametrize("alpha", [math.nan, math.inf, 1e39])
def test_an_alpha_that_is_no_number_is_refused(alpha):
    with pytest.raises(FormatError, match=r"alpha of 'b.0.to_q' is not a finite number"):
        stating(as_tensors(lora(q=2)), {"b.0.to_q": alpha})


@pytest.mark.parametrize("stored", [torch.tensor([3]), torch.tensor(3, dtype=torch.bfloat16)])
def test_alphas_become_float32_scalars(stored):
    found = stating(as_tensors(lora(q=2) | {"b.0.to_q.alpha": stored}), {})
    alpha = found.load("b.0.to_q.alpha")
    assert (alpha.shape, alpha.dtype, float(alpha)) == ((), torch.float32, 3.0)
    assert found.index["b.0.to_q.alpha"] == ((), "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b.0.to_q.lora_B.weight": None}, r"lacks 1 factors: 'b.0.to_q.lora_B.weight'"),
        ({"b.0.to_q.lora_A.weight": None}, r"lacks 1 factors: 'b.0.to_q.lora_A.weight'"),
        ({"c.alpha": torch.tensor(1.0)}, r"lacks 2 factors: 'c.lora_A.weight', 'c.lora_B.weight'"),
        ({"b.0.to_q.bias": torch.ones(1)}, r"1 tensors are no plain LoRA factors: 'b.0.to_q.bias'"),
        ({"b.0.to_q.lora_A.weight": torch.ones(3, 6)}, r"A \[3, 6\] and B \[4, 2\]"),
        ({"b.0.to_q.lora_A.weight": torch.ones(2, 6, 1)}, r"A \[2, 6, 1\]"),
        ({"b.0.to_q.lora_B.weight": torch.ones(0, 2)}, r"B \[0, 2\]"),
        ({"b.0.to_q.lora_A.weight": torch.ones(2, 6, dtype=torch.int8)}, r"A is int8"),
        ({"b.0.to_q.alpha": torch.ones(2)}, r"'b.0.to_q.alpha' has shape \[2\]"),
    ],
)
def test_what_is_no_complete_lora_is_refused(change, message):
    state = {name: tensor for name, tensor in {**lora(q=(2, 1)), **change}.items() if tensor is not None}
    with pytest.raises(FormatError, match="x.pt: .*" + message):
        modules(as_tensors(state), "x.pt")


def test_a_file_without_lora_is_refused():
    with pytest.raises(FormatError, match="holds no LoRA tensors"):
        modules(as_tensors({}))


# Fused modules


def test_fusing_parts_that_share_a_keeps_the_rank_bit_for_bit():
    state = lora(q=(2, 5), k=(2, 5), v=(2, 5), out=(3, 1))
    for part in "kv":
        state[f"b.0.to_{part}.lora_A.weight"] = state["b.0.to_q.lora_A.weight"].clone()
    fused = fuse(as_tensors(state), QKV)
    found = read(fused)
    assert set(found) == {
        f"b.0.to_{module}.{end}"
        for module in ("qkv", "out")
        for end in ("lora_A.weight", "lora_B.weight", "alpha")
    }
    assert torch.equal(found["b.0.to_qkv.lora_A.weight"], state["b.0.to_q.lora_A.weight"])
    assert torch.equal(
        found["b.0.to_qkv.lora_B.weight"],
        torch.cat([state[f"b.0.to_{part}.lora_B.weight"] for part in "qkv"]),
    )
    assert float(found["b.0.to_qkv.alpha"]) == 5
    assert fused.origins["b.0.to_qkv.lora_B.weight"] == [f"b.0.to_{part}.lora_B.weight" for part in "qkv"]
    back = read(unfuse(fused, QKV))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("parts", "rank", "alpha"),
    [
        ({"q": (2, 5), "k": (2, 5), "v": (2, 5)}, 6, 15),
        ({"q": (2, 1), "k": (4, 2), "v": (6, 3)}, 12, 6),
        ({"q": (2, 5), "k": (3, 5), "v": (1, -7)}, 6, 6),
        ({"q": (2, 5), "v": (2, 5)}, 4, 10),
        ({"k": (2, 5)}, 2, 5),
    ],
)
def test_a_fused_lora_changes_the_fused_weight_as_its_parts_do(parts, rank, alpha):
    state = lora(**parts)
    fused = fuse(as_tensors(state), QKV)
    found = read(fused)
    rows = [delta(state, f"b.0.to_{part}") if part in parts else torch.zeros(4, 6).double() for part in "qkv"]
    assert (
        fused.index["b.0.to_qkv.lora_A.weight"].shape == found["b.0.to_qkv.lora_A.weight"].shape == (rank, 6)
    )
    assert fused.index["b.0.to_qkv.lora_B.weight"].shape == found["b.0.to_qkv.lora_B.weight"].shape
    assert float(found["b.0.to_qkv.alpha"]) == alpha
    torch.testing.assert_close(delta(found, "b.0.to_qkv"), torch.cat(rows), rtol=0, atol=2e-6)
    compare(unfuse(fused, QKV), as_tensors(state), "there and back")


def test_b_is_scaled_only_where_scales_differ():
    alike, unlike = lora(q=(2, 1), k=(4, 2)), lora(q=(2, 1), k=(4, 1))
    for state, exact in ((alike, True), (unlike, False)):
        b = read(fuse(as_tensors(state), QKV))["b.0.to_qkv.lora_B.weight"]
        assert torch.equal(b[:4, :2], state["b.0.to_q.lora_B.weight"]) is exact
        assert not b[:4, 2:].any()
        assert not b[8:].any()


def test_fusing_a_bfloat16_lora_is_lossless_where_scales_agree():
    state = lora(dtype=torch.bfloat16, q=(2, 0.1), k=(2, 0.1), v=(2, 0.1))
    found = read(fuse(as_tensors(state), QKV))
    assert found["b.0.to_qkv.lora_A.weight"].dtype == torch.bfloat16
    for row, part in enumerate("qkv"):
        block = found["b.0.to_qkv.lora_B.weight"][4 * row : 4 * row + 4, 2 * row : 2 * row + 2]
        assert torch.equal(block, state[f"b.0.to_{part}.lora_B.weight"])


def test_unfusing_gives_each_part_its_rows():
    state = {
        "b.3.to_qkv.lora_A.weight": torch.arange(6.0).reshape(2, 3),
        "b.3.to_qkv.lora_B.weight": torch.arange(12.0).reshape(6, 2),
    }
    found = unfuse(as_tensors(state), QKV)
    assert {name: info.shape for name, info in found.index.items()} == {
        f"b.3.to_{part}.lora_{factor}.weight": shape
        for part in "qkv"
        for factor, shape in (("A", (2, 3)), ("B", (2, 2)))
    }
    assert torch.equal(found.load("b.3.to_k.lora_B.weight"), torch.tensor([[4.0, 5.0], [6.0, 7.0]]))
    assert torch.equal(found.load("b.3.to_v.lora_A.weight"), state["b.3.to_qkv.lora_A.weight"])
    assert found.origins["b.3.to_k.lora_B.weight"] == ["b.3.to_qkv.lora_B.weight"]


def test_fusing_and_unfusing_refuse_what_does_not_fit():
    both = lora(q=(2, 1), qkv=(2, 1))
    for change in (fuse, unfuse):
        with pytest.raises(FormatError, match=r"both 'b.0.to_qkv' and its part 'b.0.to_q'"):
            change(as_tensors(both), QKV)
    with pytest.raises(FormatError, match="has 4 rows, but consists of 3 equal parts"):
        unfuse(as_tensors(lora(qkv=(2, 1))), QKV)
    with pytest.raises(FormatError, match="states no alpha"):
        fuse(as_tensors(lora(q=2)), QKV)
    other = lora(k=(2, 1), dtype=torch.float16)
    with pytest.raises(FormatError, match=r"parts of 'b.0.to_qkv' differ in size or dtype.*float16"):
        fuse(as_tensors(lora(q=(2, 1)) | other), QKV)


# Merging


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merging_rounds_once_and_leaves_the_rest(dtype):
    state = lora(q=(2, 5))
    generator = torch.Generator().manual_seed(3)
    base = {
        "b.0.to_q.weight": torch.randn(4, 6, generator=generator).to(dtype),
        "b.0.to_q.bias": torch.ones(4, dtype=dtype),
    }
    merged = merge(as_tensors(base), as_tensors(state), scale=0.5)
    found = merged.load("b.0.to_q.weight")
    wanted = base["b.0.to_q.weight"].double() + 0.5 * delta(state, "b.0.to_q")
    assert found.dtype == dtype
    if dtype == torch.bfloat16:
        assert torch.equal(found, wanted.to(dtype))
    else:
        torch.testing.assert_close(
            found.double(), wanted, rtol=0, atol=1e-14 if dtype == torch.float64 else 1e-6
        )
    assert merged.load("b.0.to_q.bias") is base["b.0.to_q.bias"]
    assert merged.index == as_tensors(base).index
    assert merged.origins == {
        "b.0.to_q.weight": ["b.0.to_q.weight", "b.0.to_q.lora_A.weight", "b.0.to_q.lora_B.weight"]
    }


def test_merging_reads_nothing_before_a_weight_is_asked_for():
    def load(name):
        raise AssertionError(f"{name} was read")

    state = lora(q=(2, 5))
    factors = Tensors(
        as_tensors(state).index, lambda name: state[name] if name.endswith("alpha") else load(name)
    )
    base = as_tensors({"b.0.to_q.weight": torch.ones(4, 6), "other": torch.ones(1)})
    merged = merge(Tensors(base.index, load), factors)
    with pytest.raises(AssertionError, match=r"b.0.to_q.weight was read"):
        merged.load("b.0.to_q.weight")


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            {"b.0.to_k.weight": torch.ones(4, 6)},
            r"no weight for 1 of 1 LoRA modules: 'b.0.to_q.weight'.*to_k",
        ),
        ({"b.0.to_q.weight": torch.ones(4, 7)}, r"float32 \[4, 7\], but its LoRA changes .* \[4, 6\]"),
        ({"b.0.to_q.weight": torch.ones(4, 6, dtype=torch.int8)}, r"is int8"),
    ],
)
def test_a_lora_for_another_model_is_not_merged(weight, message):
    with pytest.raises(FormatError, match=message):
        merge(as_tensors(weight), as_tensors(lora(q=(2, 5))))


def test_merging_needs_alphas_and_modules():
    base = as_tensors({"b.0.to_q.weight": torch.ones(4, 6)})
    with pytest.raises(FormatError, match="states no alpha"):
        merge(base, as_tensors(lora(q=2)))
    with pytest.raises(FormatError, match="holds no LoRA tensors"):
        merge(base, as_tensors({}))


# Comparing


def scaled(state, factor, dtype=torch.float32):
    """Return the same LoRA with alpha = r where the factor is alpha / r."""
    changed = dict(state)
    changed["b.0.to_q.lora_B.weight"] = (state["b.0.to_q.lora_B.weight"].double() * factor).to(dtype)
    changed["b.0.to_q.lora_A.weight"] = state["b.0.to_q.lora_A.weight"].to(dtype)
    changed["b.0.to_q.alpha"] = torch.tensor(float(state["b.0.to_q.lora_A.weight"].shape[0]))
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_of_scaled_factors_is_no_difference(dtype):
    state = lora(q=(3, 1), dtype=dtype)
    compare(as_tensors(scaled(state, 1 / 3, dtype)), as_tensors(state))
    compare(as_tensors(scaled(lora(q=(3, 1)), 1 / 3, dtype)), as_tensors(lora(q=(3, 1))))
    with pytest.raises(FormatError, match=r"'b.0.to_q' by up to [\d.e-]+ where the largest change"):
        compare(as_tensors(scaled(state, 1 / 3.1, dtype)), as_tensors(state))


def test_one_bit_is_a_difference_where_nothing_was_scaled():
    state = lora(q=(3, 1), k=(2, 1))
    changed = {name: tensor.clone() for name, tensor in state.items()}
    b = changed["b.0.to_q.lora_B.weight"]
    b[0, 0] = torch.nextafter(b[0, 0], torch.tensor(9.0))
    compare(as_tensors(state), as_tensors(state))
    with pytest.raises(FormatError, match=r"out: does not change weights as its source does: 'b.0.to_q' by"):
        compare(as_tensors(changed), as_tensors(state), "out")
    with pytest.raises(FormatError, match=r"'b.0.to_k' by"):
        compare(as_tensors(state | {"b.0.to_k.alpha": torch.tensor(1.5)}), as_tensors(state))


def test_a_module_without_lora_counts_as_unchanged():
    state, more = lora(q=(2, 1)), lora(q=(2, 1), k=(2, 1))
    for pair in ((state, more), (more, state)):
        with pytest.raises(FormatError, match=r"'b.0.to_k' by up to .*only one of them"):
            compare(*map(as_tensors, pair))
    more["b.0.to_k.lora_B.weight"] = torch.zeros(4, 2)
    compare(as_tensors(state), as_tensors(more))


def test_what_is_not_a_number_or_of_another_size_is_a_difference():
    state, broken = lora(q=(2, 1)), lora(q=(2, 1))
    broken["b.0.to_q.lora_B.weight"] = torch.full((4, 2), math.nan)
    with pytest.raises(FormatError, match="by up to nan"):
        compare(as_tensors(broken), as_tensors(state))
    compare(as_tensors(broken), as_tensors(broken))
    with pytest.raises(FormatError, match="its size"):
        compare(as_tensors(lora(q=(2, 1), size=(5, 4))), as_tensors(state))


# What the reference implementation made


@pytest.fixture
def golden(shared):
    """The exported LoRA under canonical names, the model below it in float32, and the merged weights."""
    folder: Path = shared / "fixtures/sat"
    names = Names((Rename("transformer.{rest}", "{rest}"),))
    exported = names.read(open_safetensors(folder / "lora/hf/pytorch_lora_weights.safetensors"))
    half = read(open_safetensors(folder / "t2v_5b/hf/transformer"))
    base = as_tensors({name: tensor.float() for name, tensor in half.items()})
    merged = read(open_safetensors(folder / "lora/io.safetensors"))
    return exported, base, merged


def test_the_export_states_no_alpha(golden):
    with pytest.raises(FormatError, match="states no alpha for 8 modules"):
        merge(golden[1], golden[0])


def test_merged_weights_are_those_of_the_reference(golden):
    exported, base, reference = golden
    merged = merge(base, with_alpha(exported, 1.0))
    for layer in (0, 1):
        at = f"merged.model.diffusion_model.transformer.layers.{layer}.attention"
        ours = f"transformer_blocks.{layer}.attn1"
        qkv = torch.cat([merged.load(f"{ours}.to_{part}.weight") for part in "qkv"])
        tolerance = {"rtol": 0, "atol": 1e-6}
        torch.testing.assert_close(qkv, reference[f"{at}.query_key_value.weight"], **tolerance)
        torch.testing.assert_close(
            merged.load(f"{ours}.to_out.0.weight"), reference[f"{at}.dense.weight"], **tolerance
        )
        assert (qkv - torch.cat([base.load(f"{ours}.to_{part}.weight") for part in "qkv"])).abs().max() > 0.01


def test_fusing_the_reference_gives_its_merged_fused_weight(golden):
    exported, base, reference = golden
    templates = {
        "transformer_blocks.{i}.attn1.to_qkv": [f"transformer_blocks.{{i}}.attn1.to_{part}" for part in "qkv"]
    }
    fused = fuse(with_alpha(exported, 1.0), templates)
    for layer in (0, 1):
        ours = f"transformer_blocks.{layer}.attn1"
        state = {name: fused.load(name) for name in fused.index if name.startswith(f"{ours}.to_qkv")}
        weight = torch.cat([base.load(f"{ours}.to_{part}.weight") for part in "qkv"])
        found = merge(as_tensors({f"{ours}.to_qkv.weight": weight}), as_tensors(state))
        wanted = reference[
            f"merged.model.diffusion_model.transformer.layers.{layer}.attention.query_key_value.weight"
        ]
        torch.testing.assert_close(found.load(f"{ours}.to_qkv.weight"), wanted, rtol=0, atol=1e-6)
