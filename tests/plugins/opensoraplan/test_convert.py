"""OpenSoraPlan converts as the original converter does, and is told from other families by its names."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cvx_core import FormatError, Registry
from cvx_core.testing import names, plugin
from cvx_core.testing.format import as_tensors
from cvx_core.testing.names import numbered, parameter_shapes
from cvx_io.conversion import Request, prepare
from cvx_io.rename import NamesError
from cvx_plugins.opensoraplan.names import CANONICAL, MEGATRON, TOP, VAE
from tests.conversion.conftest import assert_same, content, digest

RANK = "release/mp_rank_{:02}/model_optim_rng.pt"
LEAVES = (
    "scale_shift_table",
    *(f"attn{n}.to_{x}.{p}" for n in "12" for x in ("q", "k", "v", "out.0") for p in ("weight", "bias")),
    *(f"ff.net.{x}.{p}" for x in ("0.proj", "2") for p in ("weight", "bias")),
)
BLOCKS = tuple(f"transformer_blocks.{i}.{leaf}" for i in range(2) for leaf in LEAVES)
SHAPES = dict.fromkeys((*TOP, *BLOCKS), (12, 4))
VAE_NAMES = (
    "encoder.conv_in.weight",
    "encoder.down.0.block.1.conv1.weight",
    "encoder.down.0.downsample.conv.weight",
    "encoder.down.2.attn.0.q.conv.bias",
    "encoder.down.2.block.0.nin_shortcut.conv.weight",
    "encoder.down.2.time_downsample.conv.weight",
    "encoder.down.2.time_downsample.mix_factor",
    "encoder.mid.attn_1.norm.weight",
    "decoder.mid.block_2.conv2.conv.bias",
    "decoder.up.3.upsample.conv.conv.weight",
    "decoder.up.3.time_upsample.mix_factor",
    "decoder.norm_out.weight",
    "decoder.conv_out.conv.weight",
    "quant_conv.conv.weight",
    "post_quant_conv.conv.bias",
)
"""One of each kind of layer that the autoencoder's configs name."""

test_plugin = plugin.suite("opensoraplan")
test_megatron = names.suite("opensoraplan:megatron", SHAPES)
test_hf = names.suite("opensoraplan:hf", SHAPES)
test_vae = names.suite("opensoraplan-vae:hf", dict.fromkeys(VAE_NAMES, (2, 4)))


@pytest.fixture
def goldens(shared):
    return shared / "fixtures/megatron"


@pytest.fixture
def digests(goldens):
    entries = json.loads((goldens / "digests.json").read_text())["files"]
    return {name: entry["digest"] for name, entry in entries.items()}


@pytest.fixture
def release(goldens):
    return goldens / "src/osp12_L2/dit/diffusion_pytorch_model.safetensors"


@pytest.fixture
def ckpt(goldens):
    return goldens / "src/osp12_L2/vae/checkpoint.ckpt"


def convert(source, target, to, **options):
    return prepare(Request(source, target, to, **options)).run(verified=True)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_split_equals_the_original(tp, release, digests, tmp_path):
    report = convert(release, tmp_path / "mm", "megatron", settings={"tp": tp})
    assert report.model == "opensoraplan"
    assert not report.dropped
    for rank in range(tp):
        got = digest(content(tmp_path / "mm" / RANK.format(rank)))
        assert got == digests[f"golden/osp12_L2/tp{tp}/{RANK.format(rank)}"]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_tree_of_the_original_becomes_the_release_again(tp, goldens, release, tmp_path):
    convert(goldens / f"golden/osp12_L2/tp{tp}", tmp_path / "back.safetensors", "hf")
    assert_same(load_file(tmp_path / "back.safetensors"), load_file(release))


def test_ranks_are_merged_as_the_original_does(goldens, digests, tmp_path):
    convert(goldens / "golden/osp12_L2/tp2", tmp_path / "whole.pt", "megatron")
    expected = digests[f"golden/osp12_L2/tp2_merged/{RANK.format(0)}"]
    assert digest(content(tmp_path / "whole.pt", key=None)) == expected


def test_a_merge_of_one_rank_is_read_although_it_is_a_list(goldens, release, tmp_path):
    tree = tmp_path / "mm"
    (tree / RANK.format(0)).parent.mkdir(parents=True)
    (tree / "latest_checkpointed_iteration.txt").write_text("release")
    state = content(goldens / "golden/osp12_L2/tp1" / RANK.format(0))
    torch.save({"model": [state]}, tree / RANK.format(0))
    convert(tree, tmp_path / "back.safetensors", "hf")
    assert_same(load_file(tmp_path / "back.safetensors"), load_file(release))


def test_pipeline_stages_are_refused(release, tmp_path):
    with pytest.raises(FormatError, match="one stage"):
        convert(release, tmp_path / "mm", "megatron", settings={"pp": 2})
    assert not (tmp_path / "mm").exists()


def test_a_folder_keeps_the_config_of_its_source(release, tmp_path):
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / release.name).write_bytes(release.read_bytes())
    (folder / "config.json").write_text('{"_class_name": "OpenSoraT2V", "num_layers": 2}')
    convert(folder, tmp_path / "half", "hf", dtype="bfloat16")
    assert json.loads((tmp_path / "half/config.json").read_text())["num_layers"] == 2
    with pytest.raises(FormatError, match=r"none to take over.*\.safetensors"):
        prepare(Request(release, tmp_path / "none", "hf"))


@pytest.mark.parametrize("lost", ["transformer_blocks.1.ff.net.2.bias", "proj_out.weight"])
def test_one_of_several_shards_is_refused(lost, release, tmp_path):
    state = load_file(release)
    save_file({name: value for name, value in state.items() if name != lost}, tmp_path / "part.safetensors")
    with pytest.raises(FormatError, match=f"lacks 1 tensors.*{lost}.*shards"):
        prepare(Request(tmp_path / "part.safetensors", tmp_path / "mm", "megatron"))


def test_a_missing_block_is_refused():
    foreign = dict.fromkeys(name for name in SHAPES if not name.startswith("transformer_blocks.0."))
    with pytest.raises(FormatError, match=rf"lacks {len(LEAVES)} tensors.*transformer_blocks\.0\."):
        CANONICAL.plan(foreign)


def test_no_table_accepts_the_other_family(goldens):
    registry = Registry.discover()
    theirs = {name: registry.get("names", f"cogvideox:{name}").load() for name in ("megatron", "sat")}
    their_vae = registry.get("names", "cogvideox-vae:sat").load()
    ours = as_tensors(numbered(SHAPES))
    vae = content(goldens / "golden/osp12_L2/vae/casualvae_mm.pt", key=None)
    for table in (*theirs.values(), their_vae):
        for foreign in (ours.index, MEGATRON.write(ours).index, vae):
            with pytest.raises(NamesError):
                table.plan(foreign)
    for release in ("cogvideox-2b", "cogvideox-5b-i2v", "cogvideox-1.5-5b"):
        state = as_tensors(numbered(parameter_shapes("predictor", release, {})))
        _refused(state.index, *(table.write(state).index for table in theirs.values()))
    state = as_tensors(numbered(parameter_shapes("autoencoder", "cogvideox-vae", {})))
    _refused(state.index, their_vae.write(state).index)


def _refused(*states):
    for foreign in states:
        for table in (MEGATRON, CANONICAL, VAE):
            with pytest.raises(NamesError):
                table.plan(foreign)


def test_the_autoencoder_equals_the_original(goldens, ckpt, tmp_path):
    report = convert(ckpt, tmp_path / "casualvae_mm.pt", "megatron")
    assert set(report.dropped) == {"epoch", "state_dict"}
    golden = content(goldens / "golden/osp12_L2/vae/casualvae_mm.pt", key=None)
    assert_same(content(tmp_path / "casualvae_mm.pt", key=None), golden)
    convert(tmp_path / "casualvae_mm.pt", tmp_path / "vae.safetensors", "hf")
    assert_same(load_file(tmp_path / "vae.safetensors"), golden)
    convert(tmp_path / "vae.safetensors", tmp_path / "again.pt", "megatron")
    assert_same(content(tmp_path / "again.pt", key=None), golden)


def test_the_trained_weights_are_read_on_request(ckpt, tmp_path):
    report = convert(ckpt, tmp_path / "vae.safetensors", "hf", source_settings={"weights": "model"})
    assert set(report.dropped) == {"epoch", "ema_state_dict", "loss.logvar"}
    trained = content(ckpt, "state_dict")["gen_model"]
    expected = {name: value.load() for name, value in trained.items() if name != "loss.logvar"}
    assert_same(load_file(tmp_path / "vae.safetensors"), expected)


def test_any_wrapping_of_the_weights_is_read(ckpt, tmp_path):
    state = content(ckpt, "ema_state_dict")
    wrapped = {f"module.{name}": value for name, value in state.items()}
    trees = {
        "bare": {**state, "epoch": 3},
        "wrapped": {"ema_state_dict": wrapped, "optimizer_state": {"lr": 1.0}},
        "no-average": {"ema_state_dict": {}, "state_dict": state},
    }
    dropped = {"bare": {"epoch"}, "wrapped": {"optimizer_state"}, "no-average": {"ema_state_dict"}}
    for name, tree in trees.items():
        folder = tmp_path / name
        folder.mkdir()
        torch.save(tree, folder / "checkpoint.ckpt")
        (folder / "config.json").write_text('{"_class_name": "CausalVAEModel"}')
        report = convert(folder, tmp_path / f"{name}-hf", "hf")
        assert set(report.dropped) == dropped[name]
        assert_same(load_file(tmp_path / f"{name}-hf/diffusion_pytorch_model.safetensors"), state)
        assert (tmp_path / f"{name}-hf/config.json").is_file()


def test_a_checkpoint_without_weights_is_refused(tmp_path):
    torch.save({"epoch": 3, "state_dict": {"epoch": 3}}, tmp_path / "a.ckpt")
    with pytest.raises(FormatError, match="holds no tensors"):
        prepare(Request(tmp_path / "a.ckpt", tmp_path / "out.safetensors", "hf"))
    torch.save({"ema_state_dict": {"a": torch.ones(1)}}, tmp_path / "b.ckpt")
    with pytest.raises(FormatError, match="holds no state_dict"):
        prepare(Request(tmp_path / "b.ckpt", tmp_path / "out", "hf", source_settings={"weights": "model"}))
    with pytest.raises(FormatError, match=r"holds 2 \.ckpt files"):
        prepare(Request(tmp_path, tmp_path / "out", "hf", source_format="ckpt"))
