"""Training state on disk: whole or absent, newest wins, damage is named."""

import json

import pytest
import torch

from cvx_core import FormatError
from cvx_io import resume


def state(value):
    return {"model": {"w": torch.full((3,), float(value))}, "count": value}


def save(folder, step, keep=5):
    return resume.save(folder, step, state(step), {"note": step}, keep)


def test_what_was_saved_comes_back(tmp_path):
    path = save(tmp_path, 7)
    empty = state(0)
    resume.restore(path, empty)
    assert torch.equal(empty["model"]["w"], torch.full((3,), 7.0))
    assert empty["count"] == 7
    assert resume.read_manifest(path)["note"] == 7


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step, keep=2)
    assert [path.name for path in resume.complete(tmp_path)] == ["step-00000010", "step-00000100"]


def test_a_folder_without_its_manifest_does_not_count(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / resume.MANIFEST).unlink()
    assert resume.find(tmp_path, "auto").name == "step-00000001"


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def explode(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(resume.dcp, "save", explode)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_none_refuses_to_write_over_an_earlier_run(tmp_path):
    assert resume.find(tmp_path, "none") is None
    save(tmp_path, 4)
    with pytest.raises(FormatError, match=r"step-00000004 .* task.resume=auto"):
        resume.find(tmp_path, "none")


def test_auto_starts_afresh_where_nothing_is(tmp_path):
    assert resume.find(tmp_path / "nowhere", "auto") is None


def test_a_path_may_be_a_checkpoint_a_folder_of_them_or_a_run(tmp_path):
    path = save(tmp_path / "run" / "checkpoints", 9)
    for given in (path, path.parent, path.parent.parent):
        assert resume.find(tmp_path / "other", given) == path


def test_a_path_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FormatError, match="holds no checkpoint"):
        resume.find(tmp_path, tmp_path)


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_damaged_files_are_named(tmp_path, damage):
    path = save(tmp_path, 1)
    [data] = path.glob("*.distcp")
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(FormatError, match=data.name):
        resume.read_manifest(path)


def test_another_models_state_does_not_fit(tmp_path):
    path = save(tmp_path, 1)
    wrong = {"model": {"other": torch.zeros(3)}, "count": 0}
    with pytest.raises(FormatError, match=r"1 missing, first 'model.other'; 1 not expected, first 'model.w'"):
        resume.restore(path, wrong)
    with pytest.raises(FormatError, match=r"1 of another shape, first 'model.w'"):
        resume.restore(path, {"model": {"w": torch.zeros(4)}, "count": 0})


def test_the_manifest_lists_every_file(tmp_path):
    path = save(tmp_path, 1)
    listed = set(json.loads((path / resume.MANIFEST).read_text())["files"])
    assert listed == {file.name for file in path.iterdir()} - {resume.MANIFEST}
