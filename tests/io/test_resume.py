"""Training state on disk: whole or absent, newest wins, damage is named."""

import json
import os
import pickle
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from cvx_core import FormatError
from cvx_io import resume

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


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


def test_an_interrupted_save_is_told_of_and_goes_with_the_next(tmp_path, caplog):
    caplog.set_level("INFO", "cvx")
    kept = tmp_path / ".notes"
    kept.mkdir()
    save(tmp_path, 1)
    (tmp_path / ".step-00000002.0123abcd.partial").mkdir()
    (tmp_path / ".step-00000002.0123abcd.manifest").touch()
    assert resume.find(tmp_path, "auto").name == "step-00000001"
    assert caplog.messages == ["saving step-00000002 was interrupted, so the run goes on from step-00000001"]
    last = save(tmp_path, 3)
    assert sorted(tmp_path.iterdir()) == [kept, tmp_path / "step-00000001", last]
    caplog.clear()
    assert resume.find(tmp_path, "auto") == last
    assert caplog.messages == []


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


def remove(path):
    data_file(path).unlink()


def cut(path):
    os.truncate(data_file(path), data_file(path).stat().st_size - 1)


def flip(path):
    """Change one bit of a weight, which torch would load without a word."""
    content = bytearray(data_file(path).read_bytes())
    content[content.index(torch.full((3,), float(path.name[-1])).numpy().tobytes())] ^= 1
    data_file(path).write_bytes(content)


def garble(path):
    (path / resume.MANIFEST).write_text('{"step": 3')


def empty(path):
    (path / resume.MANIFEST).write_text("{}")


def rename(path):
    content = json.loads((path / resume.MANIFEST).read_text())
    (path / resume.MANIFEST).write_text(json.dumps({**content, "step": 7}))


def data_file(path):
    [data] = path.glob("*.distcp")
    return data


DAMAGES = {
    remove: r"distcp: is missing",
    cut: r"distcp: has \d+ bytes instead of \d+",
    flip: r"distcp: holds other bytes than were written \(CRC-32",
    garble: r"manifest.json: is no manifest \(JSONDecodeError",
    empty: r"manifest.json: is no manifest \(KeyError",
    rename: r"manifest.json: is the manifest of step 7",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(damage, tmp_path):
    path = save(tmp_path / "run", 3)
    damage(path)
    for given in (path, path.parent):
        with pytest.raises(FormatError, match=DAMAGES[damage]):
            resume.find(tmp_path / "other", given)


@pytest.mark.parametrize("damage", DAMAGES)
def test_auto_takes_the_one_before_a_damaged_one_and_says_so(damage, tmp_path, caplog):
    good, bad = save(tmp_path, 2), save(tmp_path, 3)
    damage(bad)
    assert resume.find(tmp_path, "auto") == good
    [said] = [record for record in caplog.records if record.name == "cvx"]
    assert said.levelname == "WARNING"
    assert said.getMessage().startswith(
        "DAMAGED CHECKPOINT, kept as damaged-step-00000003; the run goes on from step-00000002: "
    )
    assert re.search(DAMAGES[damage], said.getMessage())
    caplog.clear()
    assert resume.find(tmp_path, "auto") == good
    assert not [record for record in caplog.records if record.name == "cvx"]


def test_a_damaged_checkpoint_does_not_push_out_good_ones(tmp_path):
    save(tmp_path, 2)
    flip(save(tmp_path, 5))
    resume.find(tmp_path, "auto")
    save(tmp_path, 3, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-step-00000005", "step-00000003"]
    flip(save(tmp_path, 5))
    resume.find(tmp_path, "auto")
    assert "damaged-step-00000005-2" in {path.name for path in tmp_path.iterdir()}


def test_auto_starts_nothing_where_all_are_damaged(tmp_path):
    for path in (save(tmp_path, 2), save(tmp_path, 3)):
        flip(path)
    with pytest.raises(FormatError, match="all 2 checkpoints are damaged, so nothing was started"):
        resume.find(tmp_path, "auto")
    assert len(resume.complete(tmp_path)) == 2


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


class Makes:
    """Creates a folder when it is unpickled by the usual means."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("where", ["all", "entry", "planner"])
def test_metadata_that_would_run_something_is_refused_and_does_not(tmp_path, where):
    path, made = save(tmp_path, 1), tmp_path / "made"
    content = pickle.loads((path / ".metadata").read_bytes())
    if where == "entry":
        content.state_dict_metadata["count"] = Makes(made)
    elif where == "planner":
        content.planner_data = Makes(made)
    (path / ".metadata").write_bytes(pickle.dumps(Makes(made) if where == "all" else content))
    with pytest.raises(FormatError, match=r"mkdir', which is no part of a torch checkpoint"):
        resume.restore(path, state(0))
    assert not made.exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert made.exists()  # so torch's reader would have made it


def test_a_value_that_would_run_something_is_refused_and_does_not(tmp_path):
    made = tmp_path / "made"
    path = resume.save(tmp_path, 1, {"model": {"w": torch.ones(3)}, "count": Makes(made)}, {}, 1)
    with pytest.raises(FormatError, match=r"'count' is no plain value: it asks for '\w+\.mkdir'"):
        resume.restore(path, state(0))
    assert not made.exists()
    dcp.load(state(0), checkpoint_id=path, no_dist=True)
    assert made.exists()  # so torch would have made it


def test_a_chunk_that_would_run_something_is_refused_and_does_not(tmp_path):
    path, made = save(tmp_path, 1), tmp_path / "made"
    [data] = path.glob("*.distcp")
    start = data.stat().st_size
    with data.open("ab") as file:
        torch.save(Makes(made), file)
    content = pickle.loads((path / ".metadata").read_bytes())
    place = content.storage_data[MetadataIndex("model.w", (0,))]
    place.offset, place.length = start, data.stat().st_size - start
    (path / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(FormatError, match=r"cannot be read: it asks for '\w+\.mkdir', which was not run"):
        resume.restore(path, state(0))
    assert not made.exists()


def test_a_chunk_that_is_damaged_is_an_error_of_the_file(tmp_path):
    path = save(tmp_path, 1)
    [data] = path.glob("*.distcp")
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(FormatError, match=r"step-00000001: cannot be read"):
        resume.restore(path, state(0))


def test_a_folder_cut_short_is_named_before_anything_is_read(tmp_path):
    path, untouched = save(tmp_path, 1), state(0)
    [data] = path.glob("*.distcp")
    os.truncate(data, data.stat().st_size - 1)
    with pytest.raises(FormatError, match=r"distcp: was cut short"):
        resume.restore(path, untouched)
    assert torch.equal(untouched["model"]["w"], torch.zeros(3))


def test_an_interruption_while_reading_passes_through(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    path = save(tmp_path, 1)
    monkeypatch.setattr(resume.dcp.FileSystemReader, "read_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resume.restore(path, state(0))
