"""LoRA layouts: every one into every other without a bit changed, and files of other makers."""

import itertools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cvx_core import FormatError
from cvx_core.testing.format import as_tensors
from cvx_io.atomic import read_json
from cvx_io.lora import with_alpha

FILES = {"diffusers-lora": "out", "peft": "out", "comfyui": "out.safetensors", "kohya": "out.safetensors"}
WEIGHTS = {
    "diffusers-lora": "out/pytorch_lora_weights.safetensors",
    "peft": "out/adapter_model.safetensors",
    "comfyui": "out.safetensors",
    "kohya": "out.safetensors",
}
Q = "transformer_blocks.0.attn1.to_q"
A, B = torch.arange(24.0).reshape(2, 12), torch.ones(12, 2)


def assert_same(found, state):
    assert dict(found.index) == {name: as_tensors(state).index[name] for name in found.index}
    assert found.index.keys() == state.keys()
    for name, tensor in found.read():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name


def names_in(path):
    with safe_open(path, "pt") as file:
        return set(file.keys()), file.metadata()


def diffusers_file(path, config=None, prefix="transformer.", **tensors):
    state = {f"transformer.{Q}.lora_A.weight": A, f"transformer.{Q}.lora_B.weight": B}
    state |= {name: tensor.clone() for name, tensor in tensors.items()}
    stated = {prefix + name: value for name, value in (config or {}).items()}
    save_file(state, path, metadata={"lora_adapter_metadata": json.dumps(stated)} if config else None)
    return path


def peft_folder(path, config, infix="", **tensors):
    path.mkdir()
    state = {
        f"base_model.model.{Q}.lora_A{infix}.weight": A,
        f"base_model.model.{Q}.lora_B{infix}.weight": B,
        **tensors,
    }
    save_file(state, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, **config}))
    return path


@pytest.mark.parametrize(("first", "second"), itertools.permutations(FILES, 2))
def test_every_layout_turns_into_every_other_bit_for_bit(first, second, make, lora, state, tmp_path):
    one, other = tmp_path / "one" / FILES[first], tmp_path / "other" / FILES[second]
    make(first).write(one, lora)
    make(second).write(other, make(first).open(one))
    assert_same(make(second).open(other), state)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_taken_by_its_own_format_alone(name, make, accepting, lora, tmp_path):
    make(name).write(tmp_path / FILES[name], lora)
    assert accepting(tmp_path / FILES[name]) == [name]
    assert accepting(tmp_path / WEIGHTS[name]) == [name]


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_lora_is_not_taken(name, make, tmp_path):
    made = make(name)
    (tmp_path / "torn.safetensors").write_bytes(b"x")
    save_file({"transformer.a.weight": A}, tmp_path / "model.safetensors")
    mixed = {"transformer.a.lora_A.weight": A, "diffusion_model.a.lora_B.weight": B}
    save_file(mixed, tmp_path / "mixed.safetensors")
    for path in ("torn.safetensors", "model.safetensors", "mixed.safetensors", "missing.safetensors", "."):
        assert not made.accepts(tmp_path / path), path


@pytest.mark.parametrize("name", FILES)
def test_no_layout_is_written_without_alphas(name, make, lora, state, tmp_path):
    del state[f"{Q}.alpha"]
    with pytest.raises(FormatError, match=rf"states no alpha for 1 modules: '{Q}'"):
        make(name).write(tmp_path / FILES[name], as_tensors(state))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FILES)
def test_a_failed_write_leaves_nothing(name, make, lora, tmp_path):
    def load(key):
        if "proj_out.lora_B" in key:
            raise ConnectionError("the source broke off")
        return lora.load(key)

    with pytest.raises(ConnectionError):
        make(name).write(tmp_path / FILES[name], type(lora)(lora.index, load))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "file"),
    [("peft", "out.safetensors"), ("comfyui", "out"), ("kohya", "out")],
)
def test_a_path_of_the_wrong_kind_is_refused(name, file, make, lora, tmp_path):
    with pytest.raises(FormatError, match="Give"):
        make(name).write(tmp_path / file, lora)
    assert list(tmp_path.iterdir()) == []


def test_writing_again_replaces_and_keeps_other_files(make, lora, tmp_path):
    small = as_tensors({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{Q}.alpha": torch.tensor(3.0)})
    for name in ("diffusers-lora", "peft"):
        folder = tmp_path / name
        make(name).write(folder, lora)
        (folder / "README.md").write_text("kept")
        (folder / "adapter_model.bin").write_text("old")
        make(name).write(folder, small)
        assert set(make(name).open(folder).index) == set(small.index)
        assert (folder / "README.md").is_file()
        assert (folder / "adapter_model.bin").exists() is (name == "diffusers-lora")


# What is in the files


def test_diffusers_files_hold_factors_and_metadata_only(make, lora, tmp_path):
    for path in (tmp_path / "folder", tmp_path / "out.safetensors"):
        make("diffusers-lora").write(path, lora)
        file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
        names, metadata = names_in(file)
        assert names == {f"transformer.{name}" for name in lora.index if not name.endswith("alpha")}
        stated = json.loads(metadata["lora_adapter_metadata"])
        assert stated["transformer.r"] == 4
        assert stated["transformer.lora_alpha"] == 8
        assert stated["transformer.rank_pattern"] == {
            "^transformer_blocks.1.attn1.to_q": 2,
            "^transformer_blocks.1.ff.net.0.proj": 3,
            "^proj_out": 1,
        }
        assert stated["transformer.alpha_pattern"] == {
            "^transformer_blocks.1.attn1.to_q": 0.1,
            "^transformer_blocks.11.norm1.linear": 1.5,
            "^proj_out": 0.001,
        }


def test_peft_folders_hold_config_and_factors(make, lora, tmp_path):
    make("peft").write(tmp_path / "out", lora)
    config = read_json(tmp_path / "out/adapter_config.json")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert config["target_modules"] == list(
        dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in lora.index if ".lora_" in name)
    )
    names, _ = names_in(tmp_path / "out/adapter_model.safetensors")
    assert names == {f"base_model.model.{name}" for name in lora.index if not name.endswith("alpha")}
    assert make("peft").open(tmp_path / "out").facts["adapter_config"] == config


def test_comfyui_files_hold_alpha_tensors(make, lora, tmp_path):
    make("comfyui").write(tmp_path / "out.safetensors", lora)
    assert names_in(tmp_path / "out.safetensors")[0] == {f"diffusion_model.{name}" for name in lora.index}


def test_kohya_files_have_no_dots_and_state_the_network(make, lora, state, tmp_path):
    make("kohya").write(tmp_path / "out.safetensors", lora)
    names, metadata = names_in(tmp_path / "out.safetensors")
    assert {name for name in names if "time_embedding" in name} == {
        "lora_unet_time_embedding_linear_1.lora_down.weight",
        "lora_unet_time_embedding_linear_1.lora_up.weight",
        "lora_unet_time_embedding_linear_1.alpha",
    }
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    one = {name: tensor for name, tensor in state.items() if name.startswith(f"{Q}.")}
    make("kohya").write(tmp_path / "out.safetensors", as_tensors(one))
    metadata = names_in(tmp_path / "out.safetensors")[1]
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "8")


# Files of other makers


def alpha_of(found, module=Q):
    return float(found.load(f"{module}.alpha")) if f"{module}.alpha" in found.index else None


@pytest.mark.parametrize(
    ("config", "tensors", "alpha"),
    [
        (None, {}, None),
        (None, {f"transformer.{Q}.alpha": torch.tensor(3.0)}, 3),
        ({"r": 2, "lora_alpha": 5}, {}, 5),
        ({"r": 2, "lora_alpha": 5}, {f"transformer.{Q}.alpha": torch.tensor(5.0)}, 5),
        ({"r": 2}, {}, None),
        ({"r": 4, "lora_alpha": 5, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k|to_q": 7}}, {}, 7),
        ({"r": 2, "lora_alpha": 5, "alpha_pattern": {"o_q": 7, "^attn1.to_q": 8}}, {}, 5),
    ],
)
def test_diffusers_files_state_alphas_in_metadata_or_tensors(config, tensors, alpha, make, tmp_path):
    found = make("diffusers-lora").open(diffusers_file(tmp_path / "x.safetensors", config, **tensors))
    assert alpha_of(found) == alpha
    assert torch.equal(found.load(f"{Q}.lora_A.weight"), A)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"r": 3}, {}, r"rank 3 of '.*to_q' in the config is not that of its factors, 2"),
        ({"lora_alpha": 5}, {f"transformer.{Q}.alpha": torch.tensor(4.0)}, "has alpha 4 in the file, but 5"),
        ({"lora_alpha": "x"}, {}, "lora_alpha or alpha_pattern cannot be read"),
        ({"alpha_pattern": {"(": 1}}, {}, "lora_alpha or alpha_pattern cannot be read"),
        ({"use_dora": True}, {}, "use_dora in use"),
        (None, {"text_encoder.a.lora_A.weight": A}, r"1 names .*'text_encoder.a.lora_A.weight'"),
        (None, {f"transformer.{Q}.lora_B.bias": A}, r"1 names .*'.*lora_B.bias'"),
        (None, {f"transformer.{Q}.lora_down.weight": A}, "are the same"),
    ],
)
def test_contradicting_or_other_diffusers_files_are_refused(config, tensors, message, make, tmp_path):
    path = diffusers_file(tmp_path / "x.safetensors", config, **tensors)
    with pytest.raises(FormatError, match=f"{path}: .*{message}"):
        make("diffusers-lora").open(path)


def test_broken_metadata_is_refused(make, tmp_path):
    path = diffusers_file(tmp_path / "x.safetensors", {"r": 2}, prefix="text_encoder.")
    with pytest.raises(FormatError, match="says nothing of the transformer"):
        make("diffusers-lora").open(path)
    state = {f"transformer.{Q}.lora_A.weight": A, f"transformer.{Q}.lora_B.weight": B}
    save_file(state, path, metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(FormatError, match="cannot be read"):
        make("diffusers-lora").open(path)


def test_the_reference_export_needs_an_alpha(make, accepting, shared):
    folder = shared / "fixtures/sat/lora/hf"
    assert accepting(folder) == ["diffusers-lora"]
    found = make("diffusers-lora").open(folder)
    assert len(found.index) == 16
    with pytest.raises(FormatError, match=r"states no alpha for 8 modules.*--alpha"):
        with_alpha(found, None, str(folder))
    assert alpha_of(with_alpha(found, 1.0)) == 1


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({"lora_alpha": 5}, 5),
        ({"lora_alpha": 5, "target_modules": ["to_k", "to_q"]}, 5),
        ({"lora_alpha": 5, "target_modules": r".*\.to_[qkv]"}, 5),
        ({"lora_alpha": 5, "target_modules": "all-linear"}, 5),
        ({"lora_alpha": 5, "alpha_pattern": {"0.attn1.to_q": 7}}, 7),
        ({"lora_alpha": 5, "init_lora_weights": "gaussian"}, 5),
        ({}, None),
    ],
)
@pytest.mark.parametrize("infix", ["", ".default"])
def test_peft_folders_of_others(config, alpha, infix, make, tmp_path):
    found = make("peft").open(peft_folder(tmp_path / "in", config, infix))
    assert alpha_of(found) == alpha
    assert torch.equal(found.load(f"{Q}.lora_A.weight"), A)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_rslora": True}, "use_rslora in use, so a weight does not change by alpha / r"),
        ({"use_dora": True}, "use_dora in use"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save in use"),
        ({"peft_type": "LOHA"}, "peft_type is LOHA; only LORA can be used"),
        ({"init_lora_weights": "pissa_niter_4"}, "started by 'pissa_niter_4'"),
        ({"r": 4}, "rank 4 of .* is not that of its factors, 2"),
        ({"target_modules": ["to_k", "o_q"]}, r"target_modules leaves out 1 modules with factors: '.*to_q'"),
        ({"target_modules": "("}, "target_modules cannot be read"),
    ],
)
def test_other_adapters_of_peft_are_refused(config, message, make, tmp_path):
    folder = peft_folder(tmp_path / "in", {"lora_alpha": 5, **config})
    with pytest.raises(FormatError, match=rf"adapter_config\.json: .*{message}"):
        make("peft").open(folder)


def test_peft_weights_without_their_config_are_refused(make, tmp_path):
    folder = peft_folder(tmp_path / "in", {})
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"adapter_config\.json: cannot be read"):
        make("peft").open(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("ends", [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")])
def test_comfyui_files_of_others(ends, make, accepting, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({f"diffusion_model.{Q}.{end}.weight": t for end, t in zip(ends, (A, B), strict=True)}, path)
    assert accepting(path) == ["comfyui"]
    found = make("comfyui").open(path)
    assert torch.equal(found.load(f"{Q}.lora_B.weight"), B)
    assert alpha_of(found) is None


@pytest.mark.parametrize(("stated", "alpha"), [("6.0", 6), ("Dynamic", None), (None, None)])
def test_kohya_metadata_states_the_alpha_that_tensors_do_not(stated, alpha, make, tmp_path):
    at = f"lora_unet_{Q.replace('.', '_')}"
    tensors = {f"{at}.lora_down.weight": A, f"{at}.lora_up.weight": B}
    other = {name.replace("to_q", "to_k"): tensor.clone() for name, tensor in tensors.items()}
    other[f"{at}.alpha".replace("to_q", "to_k")] = torch.tensor(2.0)
    metadata = {"ss_network_alpha": stated} if stated else None
    save_file(tensors | other, tmp_path / "x.safetensors", metadata=metadata)
    found = make("kohya").open(tmp_path / "x.safetensors")
    assert alpha_of(found) == alpha
    assert alpha_of(found, Q.replace("to_q", "to_k")) == 2


def test_a_kohya_file_with_other_parts_is_refused(make, tmp_path):
    names = ("lora_te_text_model.lora_down.weight", "lora_te_text_model.lora_up.weight")
    save_file(dict(zip(names, (A, B), strict=True)), tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="2 names are not of a plain LoRA in this layout"):
        make("kohya").open(tmp_path / "x.safetensors")
    save_file({"lora_unet_mid_block.lora_down.weight": A}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="'mid_block' does not consist of"):
        make("kohya").open(tmp_path / "x.safetensors")
