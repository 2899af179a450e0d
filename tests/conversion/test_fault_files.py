"""Files that are damaged, missing or point nowhere: the error says which, and nothing is written."""

from __future__ import annotations

import argparse
import shutil
import struct

import pytest

from tests.conversion.sources import (
    HF,
    HF_FILE,
    LORA,
    LORA_HF,
    LZ,
    LZ_FILE,
    MM,
    MM_FILE,
    MM_FIRST,
    MM_LORA,
    SAT,
    SAT_FILE,
    TRACKER,
    VAE,
    convert_main,
    cut,
    edit,
    says,
)

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
