"""Damaged sources, wrong options, targets in the way: the error helps, and nothing is written or run."""

from __future__ import annotations

import argparse
import ctypes
import enum
import json
import os
import pickle
import shutil
import struct
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cvx_io import convert
from cvx_io.conversion import Request, prepare
from cvx_io.conversion.detect import formats_of

SAT = "sat/t2v_2b/transformer"
SAT_FILE = "1/mp_rank_00_model_states.pt"
VAE = "sat/vae/3d-vae.pt"
HF = "sat/t2v_2b/hf/transformer"
HF_FILE = "diffusion_pytorch_model.safetensors"
MM = "megatron/golden/sat_i2v10_L2/tp2_pp2_1-1"
MM_FILE = "release/mp_rank_01_000/model_optim_rng.pt"
MM_FIRST = "release/mp_rank_00_000/model_optim_rng.pt"
TRACKER = "latest_checkpointed_iteration.txt"
LZ = "megatron/src/layerzero_t2v15_L4_w2"
LZ_FILE = "iter_0000200/model_1.pt"
LORA = "sat/lora/transformer"
LORA_HF = "sat/lora/hf/pytorch_lora_weights.safetensors"
MM_LORA = "megatron/src/lora_sat_t2v15_L4__tp2_pp1_r8_a4"
WITHIN = "model.diffusion_model."
"""What the names of a SAT transformer start with."""


@pytest.fixture(scope="session")
def made(shared, tmp_path_factory, convert):
    """Return a function that gives a source by its name: a golden, or `dcp` or `shards` made of one."""
    fixtures, folder = shared / "fixtures", tmp_path_factory.mktemp("made")
    convert(fixtures / HF, folder / "dcp", "dcp", verified=False)
    convert(fixtures / HF, folder / "shards", "hf", verified=False, settings={"shard_limit": 50_000})
    return lambda name: folder / name if name in ("dcp", "shards") else fixtures / name


@pytest.fixture
def copied(made, tmp_path):
    """Return a function that copies a source, to be damaged."""

    def copy(name: str) -> Path:
        source, target = made(name), tmp_path / "source"
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            target = target.with_suffix(source.suffix)
            shutil.copyfile(source, target)
        for path in (target, *target.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        return target

    return copy


@pytest.fixture
def fails(tmp_path, capsys, registry):
    """Return a function that runs the command, which has to fail, and gives the error.

    It exits with 2, without a traceback, and leaves nothing below the parent of its target: no weights that
    any format takes, and nothing else.
    """

    def run(source: Path | str, *options: object, target: Path | str | None = None) -> str:
        folder = tmp_path / "targets"
        folder.mkdir(exist_ok=True)
        to = [] if "--to" in options else ["--to", "hf"]
        words = [str(source), str(target or folder / "out"), *to, *map(str, options)]
        assert convert_main(words) == 2
        output = capsys.readouterr()
        assert not [path for path in folder.rglob("*") if formats_of(path, registry)]
        assert not list(folder.iterdir())
        assert "Traceback" not in output.out + output.err
        assert output.err.endswith(("\n", ".\n"))
        return output.err

    return run


def convert_main(words: list[str]) -> int:
    """Run the command; argparse's own refusals count as exit codes."""
    try:
        return convert.main(words)
    except SystemExit as stop:
        return int(str(stop.code))


def says(error: str, *parts: object) -> None:
    """Assert that an error message contains all parts."""
    for part in parts:
        assert str(part) in error, f"{part} is not in: {error}"


def cut(path: Path, keep: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def edit(path: Path, change: Callable[[dict[str, Any]], object], key: str | None = None) -> None:
    """Change what a .safetensors or .pt file holds, or holds under a key."""
    if path.suffix == ".safetensors":
        state = load_file(path)
        change(state)
        save_file(state, path)
        return
    tree = torch.load(path, weights_only=False)
    change(tree if key is None else tree[key])
    torch.save(tree, path)


# Damaged and missing files


@pytest.mark.parametrize(
    ("source", "file", "told"),
    [
        (HF, HF_FILE, "cut short"),
        ("shards", "diffusion_pytorch_model-00002-of-00005.safetensors", "cut short"),
        (SAT, SAT_FILE, "cut short"),
        (VAE, "", "cut short"),
        (MM, MM_FILE, "cut short"),
        (MM, MM_FIRST, "cut short"),
        (LZ, LZ_FILE, "cut short"),
        ("dcp", "__0_0.distcp", "cut short"),
        ("dcp", ".metadata", "exhausted"),
        (LORA, "500/mp_rank_00_model_states.pt", "cut short"),
        (LORA_HF, "", "cut short"),
        (MM_LORA, "iter_0000030/mp_rank_01/model_optim_rng.pt", "cut short"),
    ],
)
@pytest.mark.parametrize("keep", [0, 0.5, 0.999])
def test_a_file_that_was_cut_short(source, file, told, keep, copied, fails):
    path = copied(source)
    damaged = path / file if file else path
    cut(damaged, keep)
    error = fails(path)
    says(error, damaged, "again")
    if keep == 0.5:
        says(error, told)


@pytest.mark.parametrize(
    ("source", "gone", "told"),
    [
        (
            "shards",
            "diffusion_pytorch_model-00002-of-00005.safetensors",
            "1 of 5 shards are missing: {gone}. Put",
        ),
        ("shards", "diffusion_pytorch_model.safetensors.index.json", "no *.safetensors.index.json"),
        (
            MM,
            "release/mp_rank_01_001",
            "1 of 2 x 2 files (tensor-parallel ranks x stages) are missing: {name}",
        ),
        (LZ, LZ_FILE, "of 2 ranks some are missing or doubled: {name}. Copy all of them"),
        ("dcp", "__0_0.distcp", "{path}/{gone}: is missing. Copy it again"),
        ("dcp", ".metadata", "no file .metadata in it"),
        (HF, HF_FILE, "download is complete"),
        (SAT, SAT_FILE, "{path}/1: holds no mp_rank_00_model_states.pt. Is the download complete?"),
        (SAT, "1", "{path}/1: no such folder, but latest names it. Copy it again"),
        (MM, "release", "{path}/release: latest_checkpointed_iteration.txt points here"),
    ],
)
def test_a_file_that_is_missing(source, gone, told, copied, fails):
    path = copied(source)
    lost = path / gone
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    says(fails(path), path, told.format(path=path, gone=gone, name=lost.name))


def test_a_stage_that_is_missing(copied, fails):
    path = copied(MM)
    for rank in (0, 1):
        shutil.rmtree(path / f"release/mp_rank_{rank:02}_001")
    says(fails(path), path / "release", "the last stage ends", "norm_final", "Copy the files of all stages")


def test_the_first_stage_that_is_missing(copied, fails):
    path = copied(MM)
    for rank in (0, 1):
        shutil.rmtree(path / f"release/mp_rank_{rank:02}_000")
    says(fails(path), "2 of 2 x 2 files", "mp_rank_00_000, mp_rank_01_000", "Copy all")


def test_tensor_parallel_ranks_that_are_missing(copied, fails):
    path = copied(MM)
    for stage in (0, 1):
        shutil.rmtree(path / f"release/mp_rank_01_{stage:03}")
    error = fails(path)
    says(error, path, "transformer_blocks.0.attn1.to_q.weight is [16, 32], expected [32, 32]")
    says(error, "Is a file of a rank, stage or shard missing?")


@pytest.mark.parametrize("dim", ["tensor", "pipeline"])
def test_ranks_that_only_the_arguments_tell_of_are_missed(dim, copied, fails):
    path = copied(MM)
    stated = argparse.Namespace(**{f"{dim}_model_parallel_size": 10**12})
    edit(path / MM_FIRST, lambda tree: tree.update(args=stated))
    says(
        fails(path),
        path / "release",
        "files (tensor-parallel ranks x stages) are missing",
        "Copy all of them",
    )


def test_two_saves_in_one_folder(copied, fails):
    path = copied(MM)
    shutil.copytree(path / "release/mp_rank_00_000", path / "release/mp_rank_00")
    says(fails(path), path / "release", "mp_rank_00 and mp_rank_00_000 are the same rank", "Remove one")


def test_chunks_of_a_virtual_pipeline_that_are_missing(made, tmp_path, fails, capsys):
    path = tmp_path / "vp"
    words = [str(made("megatron/src/sat_t2v15_L4/transformer")), str(path), "--to", "megatron"]
    assert convert_main([*words, "--set", "pp=[[1,1],[1,1]]"]) == 0
    edit(path / "release/mp_rank_00_001/model_optim_rng.pt", lambda tree: tree.pop("model1"))
    capsys.readouterr()
    says(fails(path), path / "release", "different numbers of virtual chunks")


# Tensors that are too many, missing, misshaped or odd


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


# The wrong model, format or path


@pytest.mark.parametrize(
    ("source", "options", "told"),
    [
        (SAT, ["--model", "cogvideox-5b"], ["as cogvideox-5b: does not fit", "960 missing", "--model"]),
        (SAT, ["--model", "cogvideox-2b"], ["as cogvideox-2b: does not fit", "missing"]),
        (
            HF,
            ["--model", "cogvideox-1.5-5b-i2v"],
            ["as cogvideox-1.5-5b-i2v: does not fit", "of another shape"],
        ),
        (MM, ["--model", "cogvideox-5b-i2v"], ["as cogvideox-5b-i2v: does not fit"]),
        (VAE, ["--model", "cogvideox-2b"], ["holds nothing of this model", "Check the path"]),
        (SAT, ["--model", "cogvideox-5d"], ["--model: ", "Did you mean 'cogvideox-5b'?"]),
        (SAT, ["--model", "nowhere.json"], ["nowhere.json: cannot be read", "Check the path"]),
        (SAT, ["--set-model", "num_layers=3"], ["24 missing", "transformer_blocks.2.", "--set-model"]),
        (SAT, ["--set-model", "num_heads=1000000000"], ["of these sizes cannot be built", "--set-model"]),
        (SAT, ["--from", "hf"], ["no .safetensors or pytorch_model.bin file in it", "Check the path"]),
        (SAT, ["--from", "megatron"], ["has no latest_checkpointed_iteration.txt", "Give the folder"]),
        (SAT, ["--from", "dcp"], ["no file .metadata in it", "Give the folder"]),
        (SAT, ["--from", "layerzero"], ["no iteration with model_*.pt files", "Give the folder"]),
        (SAT, ["--from", "sta"], ["no format 'sta'", "Did you mean 'sat'?"]),
        (HF, ["--from", "sat"], ["holds no mp_rank_00_model_states.pt", "complete?"]),
        (HF, ["--from", "comfyui"], ["64 names are not of a plain LoRA", "Expected"]),
        (HF, ["--from", "peft"], ["adapter_config.json: cannot be read", "Check the path"]),
        (MM, ["--from", "sat"], ["holds no mp_rank_00_model_states.pt", "complete?"]),
        (f"{HF}/{HF_FILE}", ["--from", "sat"], ["not a torch.save file", "again"]),
        (f"{SAT}/{SAT_FILE}", ["--from", "hf"], ["are no tensors", "Is it a training state"]),
        (f"{SAT}/latest", [], ["of no format that is known", "--from"]),
        (f"{HF}/config.json", [], ["of no format that is known", "--from"]),
        (f"{HF}/config.json/x", [], ["no such file or folder", "Check the path"]),
        (f"{HF}/no-such-folder", ["--from", "sat"], ["no such file or folder", "Check the path"]),
        (HF, ["--to", "hff"], ["no format 'hff'", "Did you mean 'hf'?"]),
        (HF, ["--to", "layerzero"], ["are written by training", "Convert to megatron"]),
        (LORA_HF, ["--to", "dcp", "--alpha", "1"], ["holds no LoRA weights", "Formats that do: "]),
        (HF, ["--to", "comfyui"], ["'hf' holds a model's weights", "--from"]),
        (SAT, ["--to", "peft", "--alpha", "1"], ["Does it hold LoRA weights?"]),
    ],
)
def test_what_is_not_what_it_was_taken_for(source, options, told, made, fails):
    path = made(source)
    about = [] if "--to" in options or "Did you mean" in told[-1] or "nowhere.json" in options else [path]
    says(fails(path, *options), *about, *told)


def test_image_to_video_weights_taken_for_text_to_video(made, fails):
    path, config = made("sat/i2v_5b/transformer"), made("sat/t2v_5b/hf/transformer") / "config.json"
    says(
        fails(path, "--model", config),
        path,
        "patch_embed.proj.weight is [48, 8, 2, 2], expected [48, 4, 2, 2]",
    )


def test_names_of_a_newer_export(copied, fails):
    path = copied(SAT)

    def rename(state):
        for name in list(state):
            state[name.replace("attention.dense", "attn.out")] = state.pop(name)

    edit(path / SAT_FILE, rename, "module")
    error = fails(path)
    says(error, path / SAT_FILE, "no rule matches 4 of the names", "transformer.layers.0.attn.out.weight")
    says(error, "Nearest rule: 'model.diffusion_model.transformer.layers.{i}.attention", "newer export?")


def test_an_empty_folder(tmp_path, fails):
    (tmp_path / "empty").mkdir()
    says(fails(tmp_path / "empty"), tmp_path / "empty", "an empty folder. Check the path")


def test_a_folder_of_several_models_lists_them(made, tmp_path, fails):
    for name in ("a", "b"):
        shutil.copytree(made(SAT), tmp_path / "models" / name)
    error = fails(tmp_path / "models")
    says(error, "not the weights of one model, but it holds:", "a (sat)", "b (sat)", "Convert one of them")


def test_a_whole_module_in_a_file(tmp_path, fails, monkeypatch):
    theirs = types.ModuleType("theirs")
    theirs.Net = type("Net", (torch.nn.Linear,), {"__module__": "theirs"})
    monkeypatch.setitem(sys.modules, "theirs", theirs)
    torch.save(theirs.Net(2, 2), tmp_path / "net.pt")
    says(
        fails(tmp_path / "net.pt"),
        tmp_path / "net.pt",
        "holds <theirs.Net, not loaded>",
        "Save a state_dict()",
    )


# Trackers, configs and indexes


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"77", ["{path}/77: no such folder, but latest names it", "--set-from tag=NAME"]),
        (b"", ["{path}/latest: holds ''; expected the name of a folder"]),
        (b"..", ["{path}/latest: holds '..'; expected the name of a folder"]),
        (b"../../source/1", ["{path}/latest: holds", "expected the name of a folder"]),
        (b"\xff\xfe1", ["{path}/latest: is not text", "again"]),
    ],
)
def test_a_latest_that_leads_nowhere(content, told, copied, fails):
    path = copied(SAT)
    (path / "latest").write_bytes(content)
    says(fails(path), *(part.format(path=path) for part in told))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"100", ["{path}/iter_0000100: latest_checkpointed_iteration.txt points here", "complete?"]),
        (b"newest", ["{path}/latest_checkpointed_iteration.txt: holds 'newest'; expected `release` or"]),
        ("\u00b2".encode(), ["{path}/latest_checkpointed_iteration.txt: holds", "expected `release` or"]),
        (b"\xff", ["{path}/latest_checkpointed_iteration.txt: is not text", "again"]),
    ],
)
def test_a_tracker_that_leads_nowhere(content, told, copied, fails):
    path = copied(MM)
    (path / TRACKER).write_bytes(content)
    says(fails(path), *(part.format(path=path) for part in told))


@pytest.mark.parametrize(("source", "file"), [(SAT, "latest"), (MM, TRACKER)])
def test_a_tracker_may_end_in_a_newline(source, file, copied, tmp_path):
    path = copied(source)
    (path / file).write_text((path / file).read_text() + "\n")
    assert convert_main([str(path), str(tmp_path / "out"), "--to", "hf"]) == 0


def test_two_trackers_that_disagree(copied, fails):
    path = copied(MM)
    (path / "latest_checkpointed_iterations.txt").write_text("7")
    says(fails(path), path / TRACKER, "holds 'release', but", "holds '7'", "Remove one")


def test_a_tag_that_is_a_number_needs_no_quotes(made, fails, tmp_path):
    says(fails(made(SAT), "--set-from", "tag=9"), made(SAT) / "9", "no such folder", "--set-from tag=NAME")
    words = [str(made(SAT)), str(tmp_path / "out"), "--to", "sat", "--set-from", "tag=1", "--set", "tag=500"]
    assert convert_main(words) == 0
    assert (tmp_path / "out/latest").read_text() == "500"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text[:-5], ["cannot be read as JSON", "again"]),
        (lambda text: "[]", ["expected a JSON object, got list"]),
        (
            lambda text: text.replace('"num_layers": 2', '"num_layers": "two"'),
            ["num_layers", "valid integer", "Correct"],
        ),
        (
            lambda text: text.replace('"num_layers": 2', '"num_layers": 5'),
            ["as cogvideox: does not fit", "missing"],
        ),
        (
            lambda text: text.replace('"num_attention_heads": 3', '"num_attention_heads": 1000000000'),
            ["of these sizes cannot be built", "config.json"],
        ),
    ],
)
def test_a_config_that_is_damaged(change, told, copied, fails):
    path = copied(HF)
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(change(text))
    assert change(text) != text
    says(fails(path, "--to", "sat"), path, *told)


def test_an_index_that_names_a_file_elsewhere(copied, fails):
    path = copied("shards")
    index = path / "diffusion_pytorch_model.safetensors.index.json"
    shutil.move(path / "diffusion_pytorch_model-00001-of-00005.safetensors", path.parent / "x.safetensors")
    text = index.read_text().replace("diffusion_pytorch_model-00001-of-00005.", "../x.")
    index.write_text(text)
    says(fails(path), index, "'../x.safetensors' is not a plain file name")


@pytest.mark.parametrize("length", [2**62, 2**64 - 1, 0, 60_000])
def test_a_header_length_that_cannot_be(length, copied, fails):
    path = copied(HF)
    data = (path / HF_FILE).read_bytes()
    (path / HF_FILE).write_bytes(struct.pack("<Q", length) + data[8:])
    says(fails(path), path / HF_FILE, "again")


# Pickles that are out to do something


class Trap:
    """Creates a file when a pickle of it is loaded in the usual way."""

    path = ""

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """An object whose pickle is armed, as is checked first; afterwards it has not gone off."""
    path = tmp_path / "executed"
    monkeypatch.setattr(Trap, "path", str(path))
    pickle.loads(pickle.dumps(Trap())).close()
    path.unlink()
    yield Trap()
    assert not path.exists(), "code in a pickle was run"


@pytest.fixture
def their_classes(monkeypatch):
    """Stand-ins for the classes in LayerZero's files, so that they can be changed and saved again."""
    for module, names in {
        "mindspeed_mm.configs.config": ("MMConfig", "ConfigReader"),
        "mindspeed.core.distributed.layerzero.state.fqn": ("ShardFlattenInfo",),
        "megatron.core.transformer.enums": ("AttnMaskType",),
    }.items():
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        for name in names:
            made = type(name, (), {"__module__": module, "__init__": lambda self, *args: None})
            setattr(sys.modules[module], name, made)


HARMLESS = [
    (SAT, SAT_FILE, lambda tree, trap: tree.update(optimizer=trap)),
    (SAT, SAT_FILE, lambda tree, trap: tree["module"].update({"trap": trap, 7: trap})),
    (VAE, "", lambda tree, trap: tree.update(callbacks=[{"a": trap}])),
    (MM, MM_FIRST, lambda tree, trap: tree.update(args=trap)),
    (MM, MM_FIRST, lambda tree, trap: tree.update(rng_state=[trap])),
    (LZ, "iter_0000200/model_0.pt", lambda tree, trap: tree.update(args=trap)),
]
FATAL = [
    (SAT, SAT_FILE, lambda tree, trap: tree.update(module=trap), "Check the path"),
    (
        SAT,
        SAT_FILE,
        lambda tree, trap: tree["module"].update({f"{WITHIN}mixins.final_layer.linear.bias": trap}),
        "proj_out.bias",
    ),
    (MM, MM_FIRST, lambda tree, trap: tree.update(model=trap), "holds no tensors under `model`"),
    (
        MM,
        MM_FIRST,
        lambda tree, trap: tree["model"].update({"patch_embed.proj.bias": trap}),
        "patch_embed.proj.bias",
    ),
    (LZ, "iter_0000200/model_0.pt", lambda tree, trap: tree.update(model=trap), "LayerZero"),
    (LZ, "iter_0000200/model_0.pt", lambda tree, trap: tree.update(parallel_state=trap), "LayerZero"),
    (LZ, "iter_0000200/model_0.pt", lambda tree, trap: tree.update(shard_state_dict=[trap]), "LayerZero"),
]


@pytest.mark.parametrize(("source", "file", "change"), HARMLESS)
def test_code_beside_the_weights_is_not_run(source, file, change, trap, copied, tmp_path, their_classes):
    path = copied(source)
    edit(path / file if file else path, lambda tree: change(tree, trap))
    assert convert_main([str(path), str(tmp_path / "out"), "--to", "hf", "--verify"]) == 0
    dropped = json.loads((tmp_path / "out/conversion.json").read_text())["dropped"]
    assert {"optimizer", "trap", "callbacks", "args", "rng_state"} & dropped.keys()


@pytest.mark.parametrize(("source", "file", "change", "told"), FATAL)
def test_code_in_place_of_weights_is_not_run(source, file, change, told, trap, copied, fails, their_classes):
    path = copied(source)
    edit(path / file, lambda tree: change(tree, trap))
    says(fails(path), path, told)


def test_code_in_the_metadata_of_a_distributed_checkpoint_is_not_run(trap, copied, fails):
    path = copied("dcp")
    with (path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    metadata.planner_data = trap
    with (path / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    says(fails(path), path / ".metadata", "was not run", "Do not trust this folder")


class ByName(pickle.Pickler):
    """Pickles members of enums as Python 3.11.2 does: getattr(class, name)."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_metadata_that_an_earlier_python_saved_is_read(copied, tmp_path):
    path = copied("dcp")
    with (path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    with (path / ".metadata").open("wb") as file:
        ByName(file).dump(metadata)
    assert b"getattr" in (path / ".metadata").read_bytes()
    assert convert_main([str(path), str(tmp_path / "out"), "--to", "hf", "--verify"]) == 0


class Attribute:
    """Asks for an attribute of a class or a function when it is loaded."""

    def __init__(self, owner):
        self.owner = owner

    def __reduce__(self):
        return getattr, (self.owner, "__call__")


@pytest.mark.parametrize("owner", [shutil.rmtree, Path, dict])
def test_metadata_may_take_nothing_else_by_name(owner, copied, fails):
    path = copied("dcp")
    with (path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    metadata.planner_data = Attribute(owner)
    with (path / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    says(fails(path), path / ".metadata", "was not run", "Do not trust this folder")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("name", "options"), [("x.bin", ["--from", "hf"]), ("x.pt", []), ("x.pt", ["--from", "sat"])]
)
def test_code_in_a_single_file_is_not_run(name, options, zipped, trap, tmp_path, fails):
    path = tmp_path / name
    for tree in ({"a.weight": torch.ones(2), "b": trap}, trap):
        torch.save(tree, path, _use_new_zipfile_serialization=zipped)
        says(fails(path, *options), path)


def test_a_pickle_that_asks_for_all_memory(copied, fails):
    path = copied("dcp")
    data = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(b"\x80\x02]r\xff\xff\xff\x7f0" + data[2:])
    says(fails(path), path / ".metadata", "damaged pickle: place 2147483647 in the memo", "again")


def test_other_names_in_one_shard_of_layerzero(copied, fails, their_classes):
    path = copied(LZ)
    edit(path / LZ_FILE, lambda tree: tree["model"].update(extra=torch.ones(3)))
    says(fails(path), path / LZ_FILE, "holds other names than model_0.pt", "from one save")


def test_a_shard_of_layerzero_that_lacks_elements(copied, fails, their_classes):
    path = copied(LZ)

    def shorten(tree):
        found = next(key for key in tree["model"] if key.endswith("proj_out_linear.weight"))
        tree["model"][found] = tree["model"][found][:-1].clone()

    edit(path / LZ_FILE, shorten)
    says(
        fails(path),
        path / "iter_0000200",
        "'proj_out_linear.weight'",
        "Are files missing, or of another save?",
    )


# Settings and options


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--set", "tp=4"], ["tp=4 does not divide the model's 3 heads", "Choose one of [1, 3]"]),
        (["--set", "tp=0"], ["--set tp: got 0; Input should be greater than or equal to 1"]),
        (["--set", "tp=two"], ["--set tp: got 'two'; Input should be a valid integer"]),
        (["--set", "tp=2.0"], ["--set tp: got 2.0; Input should be a valid integer"]),
        (["--set", "tpp=2"], ["--set tpp: 'megatron' has no such field. Did you mean 'tp'?"]),
        (
            ["--set", "pp=[1,2.5]"],
            ["--set pp: got [1, 2.5]; Input should be a valid integer", "layers of each"],
        ),
        (["--set", "pp=[]"], ["--set pp: got []", "layers of each"]),
        (["--set", "pp=[2,0]"], ["--set pp: got [2, 0]", "layers of each"]),
        (["--set", "pp=[3,4]"], ["pp sizes [3, 4] sum to 7, but the model has 2 layers", "Give 2 sizes"]),
        (["--set", "pp=[[1,1],[1]]"], ["every virtual chunk needs the same number of stages"]),
        (["--set", "pp=3"], ["pp=3 is more than the model's 2 layers", "Choose fewer"]),
        (["--set", "tp=1", "--set", "tp=3"], ["--set tp: given twice. Leave one out"]),
        (["--set", "tp"], ["--set tp: expected KEY=VALUE, such as tp=2"]),
        (["--set", "=2"], ["--set =2: expected KEY=VALUE"]),
        (["--set", "tp=["], ["--set tp=[: '[' is no YAML value"]),
        (["--set", "path=x"], ["--set path: paths are SRC and DST"]),
        (["--set", "replicas=first"], ["--set replicas: does nothing here. Give it with --set-from"]),
        (
            ["--set", "positions=other"],
            ["--set positions: got 'other'; Input should be 'pos_embed' or 'rope'"],
        ),
        (["--to", "hf", "--set-from", "lorra=drop"], ["'sat' has no such field. Did you mean 'lora'?"]),
        (["--to", "hf", "--set", "shard_limit=0"], ["--set shard_limit: got 0"]),
        (
            ["--to", "sat", "--set", "tag=../x"],
            ["--set tag: got '../x'; expected the plain name of a folder"],
        ),
        (["--to", "sat", "--set", "tag=.."], ["--set tag: got '..'; expected the plain name of a folder"]),
        (["--to", "hf", "--set-model", "sample_hight=8"], ["Did you mean 'sample_height'?"]),
        (["--to", "hf", "--set-model", "num_layers=-3"], ["--set-model num_layers: got -3"]),
        (["--to", "hf", "--dtype", "int8"], ["--dtype int8: expected float16, bfloat16, float32 or float64"]),
        (["--to", "hf", "--alpha", "1"], ["--alpha: does nothing here", "Leave it out"]),
        (["--to", "hf", "--scale", "2"], ["--scale: does nothing here", "Leave it out"]),
        (["--to", "hf", "--alpha", "big"], ["argument --alpha: invalid float value: 'big'"]),
        (["--to", "hf", "--merge-lora", "nowhere"], ["nowhere: no such file or folder. Check the path"]),
    ],
)
def test_an_option_that_does_not_fit(options, told, made, fails):
    to = [] if "--to" in options else ["--to", "megatron"]
    says(fails(made(SAT), *to, *options), *told)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], ["states no alpha for 8 modules", "transformer_blocks.0.attn1.to_q", "pass --alpha"]),
        (["--alpha", "nan"], ["alpha of", "is not a finite number"]),
        (["--alpha", "1", "--model", "cogvideox-2b"], ["--model: does nothing here", "LoRA weights alone"]),
        (["--alpha", "1", "--set-model", "num_layers=2"], ["--set-model: does nothing here"]),
        (["--alpha", "1", "--scale", "2"], ["--scale: does nothing here"]),
        (["--alpha", "1", "--merge-lora", "x"], ["--merge-lora: does nothing here"]),
        (
            ["--alpha", "1", "--to", "megatron-lora", "--set", "tp=5"],
            ["cannot be split over tp=5", "divides"],
        ),
        (["--alpha", "1", "--to", "megatron-lora", "--set", "pp=[1,2]"], ["sum to 3", "Give 2 sizes"]),
        (["--alpha", "1", "--to", "comfyui"], ["out: this layout is one file", "ends in .safetensors"]),
        (["--alpha", "1", "--to", "comfyui", "--set", "rank=4"], ["--set rank: 'comfyui' has no such field"]),
    ],
)
@pytest.mark.parametrize("run", [[], ["--dry-run"]])
def test_an_option_that_does_not_fit_a_lora(options, told, run, made, fails):
    to = [] if "--to" in options else ["--to", "diffusers-lora"]
    says(fails(made(LORA), *to, *options, *run), *told)


def test_a_lora_that_fits_no_layer(made, fails):
    lora = made(LORA_HF)
    smaller = fails(made("megatron/src/sat_i2v10_L2/transformer"), "--merge-lora", lora, "--alpha", "1")
    says(smaller, lora, "to_k.weight' is float32 [32, 32], but its LoRA changes", "for another model?")
    other = fails(made(VAE), "--merge-lora", lora, "--alpha", "1", "--set-model", "scale_factor=0.7")
    says(other, lora, "no weight for 8 of 8 LoRA modules", "transformer_blocks.0.attn1.to_k.weight")


def test_a_model_given_as_a_lora(made, fails):
    says(fails(made(SAT), "--merge-lora", made(HF)), made(HF), "'hf' holds a model's weights", "--from")


def test_a_scale_that_is_no_number(made, fails):
    options = ["--merge-lora", made(LORA_HF), "--alpha", "1", "--scale", "inf"]
    says(fails(made(LORA), "--set-from", "lora=drop", *options), "--scale inf: expected a finite number")


# Targets


@pytest.fixture
def place(made, tmp_path, capsys, monkeypatch):
    """A folder with a finished conversion `out` in it, and a function whose conversion is refused in it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "place"
    assert convert_main([str(made(HF)), str(folder / "out"), "--to", "hf"]) == 0

    def refused(source: Path | str, target: Path | str, *options: str) -> str:
        def content():
            paths = [folder, *sorted(folder.rglob("*"))]
            return [(str(path), path.read_bytes() if path.is_file() else b"") for path in paths]

        before = content()
        capsys.readouterr()
        assert convert_main([str(source), str(target), "--to", "sat", *options]) == 2
        assert content() == before
        return capsys.readouterr().err

    return types.SimpleNamespace(folder=folder, refused=refused)


@pytest.mark.parametrize("options", [[], ["--overwrite"], ["--dry-run"]])
def test_source_and_target_are_kept_apart(options, place, monkeypatch):
    out, link = place.folder / "out", place.folder / "link"
    link.symlink_to(out)
    (place.folder / "sub").mkdir()
    monkeypatch.chdir(place.folder / "sub")
    for target in (out, link, place.folder, out / "../out", "../out"):
        says(place.refused(out, target, *options), target, "holds the source", "Choose another target")
        says(
            place.refused(out / HF_FILE, target, "--model", str(out / "config.json"), *options),
            "holds the source",
        )
    for target in (out / "new", link / "new", out / "new/er"):
        says(
            place.refused(out, target, *options), target, "lies inside the source", "Choose a target outside"
        )


def test_an_existing_target_needs_overwrite(place, made):
    says(place.refused(made(SAT), place.folder / "out"), "out: exists already. Give --overwrite")
    says(place.refused(made(SAT), place.folder / "out", "--dry-run"), "out: exists already. Give --overwrite")
    assert convert_main([str(made(SAT)), str(place.folder / "out"), "--to", "sat", "--overwrite"]) == 0
    assert sorted(item.name for item in (place.folder / "out").iterdir()) == [
        "1",
        "conversion.json",
        "latest",
    ]
    assert [item.name for item in place.folder.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["notes.md", "cache/latents.npy", ".git/HEAD"])
def test_a_target_that_holds_other_things_is_never_replaced(name, place, made):
    mine = place.folder / "out" / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    error = place.refused(made(SAT), place.folder / "out", "--overwrite")
    says(error, place.folder / "out", "holds other things", name, "Remove it yourself")


def test_a_target_that_is_no_checkpoint_is_never_replaced(place, made):
    for name in ("data.json", "a.safetensors/b.json"):
        file = place.folder / "mine" / name
        file.parent.mkdir(parents=True)
        file.write_text("[]")
        says(place.refused(made(SAT), place.folder / "mine"), "no finished conversion in it")
        error = place.refused(made(SAT), place.folder / "mine", "--overwrite")
        says(error, "holds other things", name, "Remove it yourself")
        shutil.rmtree(place.folder / "mine")
    (place.folder / "note").write_text("mine")
    says(place.refused(made(SAT), place.folder / "note", "--overwrite"), "this is another file", "Remove it")


def test_an_empty_folder_may_be_filled(made, tmp_path):
    (tmp_path / "out").mkdir()
    assert convert_main([str(made(HF)), str(tmp_path / "out"), "--to", "sat"]) == 0


def test_the_current_folder_is_not_replaced(made, tmp_path, monkeypatch, capsys):
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b")
    for target in (".", "..", ""):
        assert convert_main([str(made(HF)), target, "--to", "sat", "--overwrite"]) == 2
        says(capsys.readouterr().err, "holds the current folder. Give a folder in it")


@pytest.mark.parametrize(
    ("to", "name", "told"),
    [
        (
            "sat",
            "out.safetensors",
            "sat writes no .safetensors file. Give the path of a folder, or of a .pt file",
        ),
        ("hf", "out.pt", "hf writes no .pt file. Give the path of a folder, or of a .safetensors file"),
        ("dcp", "out.pt", "dcp writes no .pt file. Give the path of a folder."),
        ("megatron", "out.safetensors", "megatron writes no .safetensors file"),
    ],
)
def test_a_folder_is_not_given_the_name_of_a_file(to, name, told, made, fails, tmp_path):
    says(fails(made(HF), "--to", to, target=tmp_path / "targets" / name), tmp_path / "targets" / name, told)


def test_a_target_below_a_file(place, made):
    (place.folder / "file").write_text("x")
    for target in (place.folder / "file/out", place.folder / "file/a/b"):
        says(place.refused(made(SAT), target), f"{target}: cannot write in {place.folder / 'file'}")


def test_a_link_that_leads_nowhere_is_refused_and_another_is_followed(place, made, tmp_path):
    (place.folder / "broken").symlink_to(tmp_path / "nowhere")
    says(
        place.refused(made(SAT), place.folder / "broken", "--overwrite"),
        "broken: is a link that leads nowhere",
    )
    link = tmp_path / "link"
    link.symlink_to(place.folder / "out")
    assert convert_main([str(made(SAT)), str(link), "--to", "sat", "--overwrite"]) == 0
    assert link.is_symlink()
    assert (place.folder / "out/latest").exists()


@pytest.mark.parametrize(
    ("source", "change", "options"),
    [
        (SAT, lambda path: cut(path / SAT_FILE), []),
        (HF, lambda path: edit(path / HF_FILE, lambda state: state.update(extra=torch.ones(1))), []),
        (HF, lambda path: None, ["--set", "tag=../x"]),
        (MM, lambda path: edit(path / MM_FILE, change_copy), []),
        (HF, lambda path: None, ["--dtype", "int8"]),
    ],
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_fault_changes_nothing_at_the_target(source, change, options, overwrite, place, copied):
    path = copied(source)
    change(path)
    place.refused(path, place.folder / "out", *options, *(["--overwrite"] if overwrite else []))


def change_copy(tree: dict[str, Any]) -> None:
    tree["model"]["videodit_blocks.0.ff.net.2.bias"] += 1


def test_unicode_spaces_relative_paths_and_links(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mod\u00e8le \u4e2d").symlink_to(made(SAT))
    words = ["mod\u00e8le \u4e2d", "ao\u00fbt/d'\u00e9t\u00e9 1", "--to", "hf", "--verify"]
    assert convert_main(words) == 0
    assert (
        convert_main(
            ["ao\u00fbt/../ao\u00fbt/d'\u00e9t\u00e9 1/", "./zur\u00fcck", "--to", "sat", "--verify"]
        )
        == 0
    )
    report = json.loads(Path("zur\u00fcck/conversion.json").read_text())
    assert report["target"]["path"] == "zur\u00fcck"
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted(
        ["ao\u00fbt", "mod\u00e8le \u4e2d", "zur\u00fcck"]
    )


# Permissions


@contextmanager
def bound_by_permissions() -> Iterator[None]:
    """Make permission bits hold for this thread, also where it is root's."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    limited = (ctypes.c_uint32 * 6)(*before)
    limited[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, effective only
    assert libc.capset(header, limited) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@pytest.fixture
def closed(tmp_path):
    """Return a function that sets the mode of a path until the test ends, from when on bits hold."""
    changed: list[Path] = []

    def close(path: Path, mode: int) -> None:
        path.chmod(mode)
        changed.append(path)

    with bound_by_permissions():
        probe = tmp_path / "probe"
        probe.touch(mode=0)
        with pytest.raises(PermissionError):
            probe.read_bytes()
        probe.unlink()
        yield close
        for path in changed:
            path.chmod(0o755)


@pytest.mark.parametrize(
    ("source", "file"),
    [
        (SAT, SAT_FILE),
        (SAT, "latest"),
        (SAT, ""),
        (HF, HF_FILE),
        (HF, "config.json"),
        (VAE, ""),
        (MM, MM_FILE),
        (LZ, LZ_FILE),
        ("dcp", ".metadata"),
        ("dcp", "__0_0.distcp"),
        (LORA_HF, ""),
    ],
)
def test_a_source_that_may_not_be_read(source, file, closed, copied, fails):
    path = copied(source)
    closed(path / file if file else path, 0)
    says(fails(path), path / file if file else path, "Permission denied", "permissions")


def test_a_source_that_may_only_be_read(closed, copied, tmp_path):
    path = copied(SAT)
    for item in (*path.rglob("*"), path):
        closed(item, 0o555 if item.is_dir() else 0o444)
    assert convert_main([str(path), str(tmp_path / "out"), "--to", "hf", "--verify"]) == 0


@pytest.mark.parametrize("name", ["out", "new/folder/out"])
def test_a_target_where_nothing_may_be_written(name, closed, made, tmp_path, capsys):
    folder = tmp_path / "closed"
    folder.mkdir()
    closed(folder, 0o555)
    assert convert_main([str(made(SAT)), str(folder / name), "--to", "hf"]) == 2
    says(capsys.readouterr().err, folder / name, f"cannot write in {folder}", "permissions")
    assert list(folder.iterdir()) == []


def test_a_folder_that_may_be_written_in_a_parent_that_may_not(closed, made, tmp_path, capsys):
    folder = tmp_path / "closed"
    (folder / "out").mkdir(parents=True)
    closed(folder, 0o555)
    assert convert_main([str(made(SAT)), str(folder / "out"), "--to", "hf"]) == 2
    says(capsys.readouterr().err, f"cannot write in {folder}")
    assert convert_main([str(made(SAT)), str(folder / "out/out"), "--to", "hf"]) == 0


# From Python


def test_preparing_reads_no_weights_and_writes_nothing(made, tmp_path, registry, monkeypatch):
    monkeypatch.setattr("cvx_io.tensors.stored.Stored.load", lambda self: pytest.fail("weights were read"))
    job = prepare(Request(made(HF), tmp_path / "out", "megatron", settings={"tp": 3}), registry)
    job.check()
    assert "64 tensors" in job.report.text()
    assert list(tmp_path.iterdir()) == []
