"""Sources that may not be read and targets that may not be written."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conversion.sources import (
    HF,
    HF_FILE,
    LORA_HF,
    LZ,
    LZ_FILE,
    MM,
    MM_FILE,
    SAT,
    SAT_FILE,
    VAE,
    convert_main,
    says,
)


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
