"""The hf format on real folders: exports others can load, tables, .bin files, and weights that do not fit."""

import json
import shutil

import pytest
import torch

from cvx_core import FormatError
from cvx_core.testing.format import as_tensors
from cvx_core.weights import check_index, copy_into
from cvx_io.rename import Cat, Names, Rename
from cvx_plugins.formats import HFConfig
from cvx_plugins.formats.hf import HF

STATE = {"a.weight": torch.arange(6.0).reshape(3, 2), "b.weight": torch.ones(2)}


def hf(**fields):
    return HF(HFConfig(**fields))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def transformer(shared):
    return shared / "fixtures/megatron/src/hf_t2v15_L4/transformer"


def test_diffusers_loads_our_export(transformer, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    config = json.loads((transformer / "config.json").read_text())
    hf(shard_limit=100_000).write(tmp_path / "out", hf().open(transformer), config=config)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    theirs = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    ours = dict(hf().open(transformer).read())
    state = theirs.state_dict()
    assert state.keys() == ours.keys()
    assert all(torch.equal(state[name], tensor.to(state[name].dtype)) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("config", "stem"),
    [
        ({"_class_name": "CogVideoXTransformer3DModel"}, "diffusion_pytorch_model"),
        ({}, "diffusion_pytorch_model"),
        ({"architectures": ["T5EncoderModel"], "model_type": "t5"}, "model"),
    ],
)
def test_the_file_is_named_as_its_library_expects(tmp_path, config, stem):
    hf().write(tmp_path / "out", as_tensors(STATE), config=config)
    assert files(tmp_path / "out") == ["config.json", f"{stem}.safetensors"]
    assert json.loads((tmp_path / "out/config.json").read_text()) == config


def test_a_new_export_removes_the_shards_of_the_old_one(tmp_path):
    hf(shard_limit=1).write(tmp_path, as_tensors(STATE), config={})
    (tmp_path / "README.md").write_text("kept")
    hf().write(tmp_path, as_tensors(STATE), config={})
    assert files(tmp_path) == ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]


def test_a_folder_without_config_is_not_written(tmp_path):
    with pytest.raises(FormatError, match=r"needs a config\.json"):
        hf().write(tmp_path / "out", as_tensors(STATE))
    assert files(tmp_path) == []


def test_a_table_applies_both_ways(tmp_path):
    names = Names((Cat("net.qkv", ["q", "k", "v"]), Rename("net.{rest}", "{rest}")), prefix="model.")
    state = {name: torch.full((2, 3), float(i)) for i, name in enumerate(["v", "out", "q", "k"])}
    path = tmp_path / "out.safetensors"
    hf().write(path, as_tensors(state), names)
    assert set(hf().open(path).index) == {"model.net.qkv", "model.net.out"}
    assert {name: info.shape for name, info in hf().open(path, names).index.items()} == dict.fromkeys(
        state, (2, 3)
    )
    back = dict(hf().open(path, names).read(["k", "out"]))
    assert torch.equal(back["k"], state["k"])
    assert torch.equal(back["out"], state["out"])
    assert len(back) == 2


def test_bin_files_are_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    assert hf().accepts(tmp_path)
    assert hf().open(tmp_path).index["a.weight"].shape == (3, 2)
    assert torch.equal(dict(hf().open(tmp_path).read(["b.weight"]))["b.weight"], STATE["b.weight"])


def test_an_index_file_or_one_shard_may_be_named(transformer):
    index = transformer / "diffusion_pytorch_model.safetensors.index.json"
    assert hf().accepts(index)
    assert hf().open(index).index == hf().open(transformer).index
    shard = next(transformer.glob("*00003.safetensors"))
    assert hf().open(shard).index.keys() < hf().open(transformer).index.keys()


def test_folders_of_other_kinds_are_not_accepted(pipeline_folder, shared, tmp_path):
    assert not hf().accepts(pipeline_folder)
    assert hf().accepts(pipeline_folder / "transformer")
    assert not hf().accepts(pipeline_folder / "scheduler")
    assert not hf().accepts(shared / "fixtures/sat/t2v_5b/transformer")


def test_weights_that_do_not_fit_are_all_listed_before_reading(transformer):
    index = hf().open(transformer).index
    wanted = {name: info.shape for name, info in index.items()}
    assert check_index(index, wanted, transformer).consumed == {name: name for name in index}
    del wanted["proj_out.bias"]
    wanted |= {"extra.weight": (3,), "proj_out.weight": (1, 2)}
    with pytest.raises(FormatError) as caught:
        check_index(index, wanted, transformer)
    message = str(caught.value)
    assert message.startswith(str(transformer))
    assert "1 missing:\n    extra.weight [3]" in message
    assert "1 not expected:\n    proj_out.bias" in message
    shape = list(index["proj_out.weight"].shape)
    assert f"1 of another shape:\n    proj_out.weight is {shape}, expected [1, 2]" in message


def test_streaming_into_parameters_casts_and_says_so(transformer):
    index = hf().open(transformer).index
    params = {name: torch.empty(info.shape, dtype=torch.bfloat16) for name, info in index.items()}
    casts = copy_into(params, hf().open(transformer).read(), {name: name for name in index})
    assert casts == {(next(iter(index.values())).dtype, "bfloat16"): len(index)}
    assert all(torch.equal(params[name], tensor.bfloat16()) for name, tensor in hf().open(transformer).read())


def test_a_truncated_shard_is_found_before_reading(transformer, tmp_path):
    folder = tmp_path / "transformer"
    shutil.copytree(transformer, folder)
    shard = next(folder.glob("*00002-of*.safetensors"))
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content[:-100])
    with pytest.raises(FormatError, match=rf"{shard.name}: the header announces .* cut short"):
        next(hf().open(folder).read())
