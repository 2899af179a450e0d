"""Targets in the way: nothing is replaced that is no conversion, or that the user did not give up."""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from cvx_io.conversion import Request, prepare
from tests.conversion.sources import HF, HF_FILE, MM, MM_FILE, SAT, SAT_FILE, convert_main, cut, edit, says

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


# From Python


def test_preparing_reads_no_weights_and_writes_nothing(made, tmp_path, registry, monkeypatch):
    monkeypatch.setattr("cvx_io.tensors.stored.Stored.load", lambda self: pytest.fail("weights were read"))
    job = prepare(Request(made(HF), tmp_path / "out", "megatron", settings={"tp": 3}), registry)
    job.check()
    assert "64 tensors" in job.report.text()
    assert list(tmp_path.iterdir()) == []
