"""Tensors that are too many, missing, misshaped or odd: none is lost or made up in silence."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.conversion.sources import (
    HF,
    HF_FILE,
    LORA,
    LORA_HF,
    MM,
    MM_FILE,
    SAT,
    SAT_FILE,
    VAE,
    WITHIN,
    convert_main,
    edit,
    says,
)


@pytest.mark.parametrize(
    ("source", "file", "key", "name"),
    [
        (HF, HF_FILE, None, "extra.weight"),
        ("shards", "", None, "extra.weight"),
        (SAT, SAT_FILE, "module", f"{WITHIN}extra.weight"),
        (VAE, "", "state_dict", "encoder.extra.weight"),
        (MM, MM_FILE, "model", "extra.weight"),
        (LORA_HF, "", None, "transformer.transformer_blocks.0.attn1.to_q.lora_C.weight"),
    ],
)
def test_a_tensor_that_nothing_knows(source, file, key, name, copied, fails):
    path = copied(source)
    if source == "shards":
        index = path / "diffusion_pytorch_model.safetensors.index.json"
        listed = json.loads(index.read_text())
        listed["weight_map"][name] = file = min(listed["weight_map"].values())
        index.write_text(json.dumps(listed))
    edit(path / file if file else path, lambda state: state.update({name: torch.ones(2)}), key)
    options = ["--from", "diffusers-lora", "--alpha", "1"] if source == LORA_HF else []
    says(fails(path, *options), path, name)


def test_a_tensor_that_all_ranks_hold_and_nothing_knows(copied, fails):
    path = copied(MM)
    for rank in (0, 1):
        file = path / f"release/mp_rank_{rank:02}_000/model_optim_rng.pt"
        edit(file, lambda tree: tree["model"].update({"extra.weight": torch.ones(2)}))
    says(fails(path), path / "release", "no rule matches 1 of the names: 'extra.weight'", "Nearest rule")


@pytest.mark.parametrize(
    ("source", "file", "key", "name", "told"),
    [
        (HF, HF_FILE, None, "proj_out.bias", "proj_out.bias is [5], expected [16]"),
        (
            HF,
            HF_FILE,
            None,
            "patch_embed.text_proj.weight",
            "patch_embed.text_proj.weight is [5], expected [",
        ),
        (
            SAT,
            SAT_FILE,
            "module",
            f"{WITHIN}mixins.final_layer.linear.bias",
            "proj_out.bias is [5], expected",
        ),
        (
            SAT,
            SAT_FILE,
            "module",
            f"{WITHIN}transformer.layers.0.attention.query_key_value.weight",
            "attention.query_key_value.weight' has shape [5], but consists of 3 equal parts",
        ),
        (
            SAT,
            SAT_FILE,
            "module",
            f"{WITHIN}mixins.patch_embed.text_proj.weight",
            "has names of 'cogvideox', but the shapes of none of its models",
        ),
        (VAE, "", "state_dict", "encoder.conv_in.conv.bias", "encoder.conv_in.conv.bias is [5], expected"),
        (
            MM,
            MM_FILE,
            "model",
            "videodit_blocks.0.ff.net.2.bias",
            "'videodit_blocks.0.ff.net.2.bias' is float32 [5] on",
        ),
        (
            LORA_HF,
            "",
            None,
            "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight",
            "A [5] and B [48, 4] are",
        ),
    ],
)
def test_a_tensor_of_another_shape(source, file, key, name, told, copied, fails):
    path = copied(source)
    edit(path / file if file else path, lambda state: state.update({name: torch.ones(5)}), key)
    says(fails(path, *(["--alpha", "1"] if source == LORA_HF else [])), path, told)


@pytest.mark.parametrize("to", ["hf", "sat", "megatron", "dcp"])
@pytest.mark.parametrize(
    ("source", "file", "key", "name", "told"),
    [
        (HF, HF_FILE, None, "proj_out.bias", "1 missing:\n    proj_out.bias [16]"),
        (HF, HF_FILE, None, "proj_out.weight", "1 missing:\n    proj_out.weight [16, 48]"),
        (
            SAT,
            SAT_FILE,
            "module",
            f"{WITHIN}transformer.layers.1.mlp.dense_4h_to_h.bias",
            "ff.net.2.bias [48]",
        ),
        (SAT, SAT_FILE, "module", f"{WITHIN}mixins.final_layer.linear.weight", "where tensors are missing"),
        (SAT, SAT_FILE, "module", f"{WITHIN}time_embed.2.weight", "where tensors are missing"),
    ],
)
def test_a_tensor_that_is_missing_is_missed_by_every_target(source, file, key, name, told, to, copied, fails):
    path = copied(source)
    edit(path / file, lambda state: state.pop(name), key)
    says(fails(path, "--to", to), path, told)


def test_the_tensors_that_are_missing_are_listed_for_a_model_that_is_named(copied, made, fails):
    path = copied(SAT)
    edit(path / SAT_FILE, lambda state: state.pop(f"{WITHIN}mixins.final_layer.linear.weight"), "module")
    config = made(HF) / "config.json"
    says(fails(path, "--model", config), path, "1 missing:\n    proj_out.weight [16, 48]")


def test_a_half_of_a_fused_tensor_in_a_lora(copied, fails):
    path = copied(LORA)
    name = f"{WITHIN}transformer.layers.0.attention.query_key_value.matrix_B.1"
    edit(path / "500/mp_rank_00_model_states.pt", lambda state: state.pop(name), "module")
    says(fails(path, "--to", "diffusers-lora", "--alpha", "1"), path, "lacks 1 factors", "to_k.lora_B.weight")


def test_copies_that_differ_between_ranks(copied, fails, tmp_path, capsys):
    path = copied(MM)
    name = "videodit_blocks.0.ff.net.2.bias"
    edit(path / MM_FILE, lambda tree: tree["model"][name].add_(1))
    says(fails(path), path / "release", f"copies of '{name}' differ", "--set-from replicas=first")
    assert convert_main([str(path), str(tmp_path / "out"), "--to", "hf", "--set-from", "replicas=first"]) == 0


def test_nan_is_kept_and_verified(copied, tmp_path, capsys):
    path = copied(HF)
    edit(path / HF_FILE, lambda state: state["proj_out.bias"].fill_(float("nan")))
    assert convert_main([str(path), str(tmp_path / "sat"), "--to", "sat", "--verify"]) == 0
    assert convert_main([str(tmp_path / "sat"), str(tmp_path / "hf"), "--to", "hf", "--verify"]) == 0
    assert load_file(tmp_path / "hf" / HF_FILE)["proj_out.bias"].isnan().all()


def test_float8_is_kept_and_cast_only_when_asked(copied, tmp_path):
    path = copied(HF)
    kept = load_file(path / HF_FILE)["proj_out.bias"].to(torch.float8_e4m3fn)
    edit(path / HF_FILE, lambda state: state.update({"proj_out.bias": kept}))
    for number, (options, dtype) in enumerate([([], kept.dtype), (["--dtype", "float32"], torch.float32)]):
        target = tmp_path / f"out{number}"
        assert convert_main([str(path), str(target), "--to", "hf", "--verify", *options]) == 0
        found = load_file(target / HF_FILE)["proj_out.bias"]
        assert found.dtype == dtype
        assert torch.equal(found.float(), kept.float())


def test_parts_of_larger_tensors_strides_and_tied_tensors(copied, tmp_path, capsys):
    path = copied(SAT)
    layers = f"{WITHIN}transformer.layers"
    parent, part = torch.randn(100, 100), torch.randn(48, 48)

    def tie(state):
        state[f"{layers}.0.attention.dense.weight"] = part.t()
        state[f"{layers}.1.attention.dense.weight"] = parent[3:51, 7:55]
        state[f"{layers}.0.attention.dense.bias"] = parent[0, :48]
        state[f"{layers}.1.attention.dense.bias"] = parent[0, :48]

    edit(path / SAT_FILE, tie, "module")
    assert convert_main([str(path), str(tmp_path / "out"), "--to", "hf", "--verify"]) == 0
    found = load_file(tmp_path / "out" / HF_FILE)
    attention = "transformer_blocks.{}.attn1.to_out.0"
    assert torch.equal(found[f"{attention.format(0)}.weight"], part.t())
    assert torch.equal(found[f"{attention.format(1)}.weight"], parent[3:51, 7:55])
    for number in (0, 1):
        assert torch.equal(found[f"{attention.format(number)}.bias"], parent[0, :48])
