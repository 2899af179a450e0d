import contextlib
import io
import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from benchmarks import convert, process
from benchmarks.process import Usage
from benchmarks.synthetic import DTYPE, Model, draw
from cvx_io import convert as cli

TINY = {"num_layers": 5, "num_heads": 2, "head_dim": 16, "text_dim": 8, "temb_dim": 8}
TINY |= {"latent_channels": 4, "sample_height": 4, "sample_width": 4, "sample_frames": 5}


@pytest.fixture
def model():
    return Model(convert.PRESET, TINY)


@pytest.fixture
def in_process(monkeypatch):
    """Run what the benchmark starts here, without a process for each step; returns the commands seen."""
    seen = []

    def run(command):
        words = [str(word) for word in command]
        seen.append(words)
        output = io.StringIO()
        if words[0] == "cp":
            shutil.copytree(*words[-2:])
        elif words[1] == "-c":
            output.write("1000")
        elif words[1] == "-m":
            main = {"cvx_io.convert": cli.main, "benchmarks.convert": convert.main}[words[2]]
            with contextlib.redirect_stdout(output):
                assert main(words[3:]) == 0
        return Usage(wall_s=len(seen), cpu_s=1.0, private_bytes=5000, output=output.getvalue())

    monkeypatch.setattr(convert, "run", run)
    monkeypatch.setattr(convert, "full_memory", lambda *_: nullcontext())
    return seen


def test_every_conversion_is_measured_and_equal(in_process, model, tmp_path):
    work = tmp_path / "work"
    code = convert.main(
        ["--folder", str(work), "--repeats", "2", "--fields", json.dumps(TINY), "--json", str(tmp_path)]
    )
    record = json.loads((tmp_path / "convert.json").read_text())
    assert code == 0
    assert list(work.iterdir()) == []
    assert [leg["name"] for leg in record["conversions"]] == ["sat -> hf", "hf -> megatron", "megatron -> hf"]
    for leg in record["conversions"]:
        assert leg["tensors"] == len(model.tensors.index)
        assert leg["peak_bytes"] == 4000
        assert leg["ratio"] == leg["wall_s"] / leg["copy_wall_s"]
        assert len(leg["wall_samples_s"]) == len(leg["copy_wall_samples_s"]) == 2
        assert leg["bytes_written"] >= convert.total_bytes(model.tensors)
    assert record["dry_run_s"] - record["import_torch"]["wall_s"] == record["dry_run_after_import_s"]
    assert sum("pp=[1, 2, 1, 1]" in words for words in in_process) == 2


def test_a_failed_step_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    def fail(command):
        raise subprocess.CalledProcessError(2, command, "what it printed")

    monkeypatch.setattr(convert, "run", fail)
    arguments = ["--folder", str(tmp_path / "work"), "--fields", json.dumps(TINY), "--json", str(tmp_path)]
    assert convert.main(arguments) == 1
    assert "what it printed" in capsys.readouterr().err
    assert [item.name for item in tmp_path.rglob("*")] == ["work"]


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "SPACE", 1e15)
    assert convert.main(["--folder", str(tmp_path), "--fields", json.dumps(TINY)]) == 1
    assert "are needed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_source_is_what_torch_loads(model, tmp_path):
    file = model.write_sat(tmp_path / "sat")
    state = torch.load(file, weights_only=True, mmap=True)["module"]
    qkv = state["model.diffusion_model.transformer.layers.3.attention.query_key_value.weight"]
    parts = [draw(f"transformer_blocks.3.attn1.to_{x}.weight", (32, 32)) for x in "qkv"]
    assert torch.equal(qkv, torch.cat(parts))
    assert state["model.diffusion_model.mixins.pos_embed.freqs_sin"].shape == (2 * 2 * 2, 16)
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert {str(tensor.dtype) for tensor in state.values()} == {f"torch.{DTYPE}"}


def test_a_tensor_depends_on_its_name_alone():
    assert torch.equal(draw("a", (3, 5)), draw("a", (3, 5)))
    assert not torch.equal(draw("a", (3, 5)), draw("b", (3, 5)))
    assert len(draw("a", (64, 64)).view(torch.int16).unique()) > 3000


def test_differences_are_found(model):
    def flip(name):
        tensor = model.tensors.load(name).clone()
        if name == "proj_out.bias":
            tensor.view(torch.int16)[-1] ^= -0x8000  # the sign bit: equal as numbers where it is a zero
        return tensor

    index = dict(model.tensors.index)
    assert model.differences(model.tensors) == []
    assert model.differences(replace(model.tensors, load=flip)) == ["proj_out.bias"]
    assert model.differences(replace(model.tensors, index={**index, "more": index["proj_out.bias"]})) == [
        "more"
    ]
    del index["norm_final.bias"]
    assert model.differences(replace(model.tensors, index=index)) == ["norm_final.bias"]


def test_a_command_is_measured_from_outside():
    code = "import time; held = b'x' * 60_000_000; time.sleep(0.3); print('done')"
    usage = process.run([sys.executable, "-S", "-c", code])
    assert usage.output == "done\n"
    assert 0.3 < usage.wall_s < 30
    assert usage.private_bytes > 60_000_000


def test_a_command_that_fails_says_why():
    with pytest.raises(subprocess.CalledProcessError) as caught:
        process.run([sys.executable, "-S", "-c", "import sys; sys.exit('no such luck')"])
    assert (caught.value.returncode, caught.value.output) == (1, "no such luck\n")


def test_memory_is_filled_without_using_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "MOST_FILLED", 2**20)
    (tmp_path / "source").write_bytes(b"x" * 5000)
    with process.full_memory(tmp_path, tmp_path / "source"):
        assert [file.name for file in tmp_path.iterdir()] == ["source"]
    assert (tmp_path / "source").read_bytes() == b"x" * 5000
