"""Atomic writes: seen whole or not at all, whatever happens midway."""

import json

import pytest

from cvx_io.atomic import atomic_file, atomic_folder, write_json, write_text


def tree(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_file_appears_on_success_only(tmp_path):
    path = tmp_path / "deep/er/note.txt"
    with atomic_file(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert tree(tmp_path) == {"deep/er/note.txt": "new"}


def test_failed_file_keeps_the_old_one(tmp_path):
    write_text(tmp_path / "note.txt", "old")

    def write():
        with atomic_file(tmp_path / "note.txt") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert tree(tmp_path) == {"note.txt": "old"}


def test_json_is_readable_and_ends_in_a_newline(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 2]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"b": [1, 2]}
    assert text.endswith("}\n")


def test_folder_appears_on_success_only(tmp_path):
    path = tmp_path / "model"
    with atomic_folder(path, "index.json") as partial:
        (partial / "a.bin").write_text("a")
        (partial / "index.json").write_text("{}")
        assert not path.exists()
    assert tree(tmp_path) == {"model/a.bin": "a", "model/index.json": "{}"}


def test_failed_folder_leaves_nothing(tmp_path):
    def write():
        with atomic_folder(tmp_path / "model", "index.json") as partial:
            (partial / "a.bin").write_text("a")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_keeps_foreign_files_and_loses_stale_ones(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    for name in ("index.json", "old-1.bin", "old-2.bin", "README.md"):
        (path / name).write_text("old")
    with atomic_folder(path, "index.json", stale=("*.bin",)) as partial:
        (partial / "new-1.bin").write_text("new")
        (partial / "index.json").write_text("new")
    assert tree(path) == {"index.json": "new", "new-1.bin": "new", "README.md": "old"}


def test_failed_write_into_existing_folder_changes_nothing(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "index.json").write_text("old")

    def write():
        with atomic_folder(path, "index.json", stale=("*",)) as partial:
            (partial / "index.json").write_text("new")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write()
    assert tree(tmp_path) == {"model/index.json": "old"}


def test_a_crash_while_moving_in_leaves_no_manifest(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.mkdir()
    (path / "index.json").write_text("old")
    (path / "a.bin").write_text("old")
    move = type(path).replace

    def break_at_b(self, target):
        if self.name == "b.bin":
            raise OSError("power cut")
        return move(self, target)

    monkeypatch.setattr(type(path), "replace", break_at_b)

    def write():
        with atomic_folder(path, "index.json", stale=("*.bin",)) as partial:
            for name in ("a.bin", "b.bin", "index.json"):
                (partial / name).write_text("new")

    with pytest.raises(OSError, match="power cut"):
        write()
    assert tree(tmp_path) == {"model/a.bin": "new"}
