"""Writes that are seen whole or not at all: a temporary name, fsync, then a rename."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cvx_core.errors import FormatError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what is written there becomes `path` on success, and vanishes on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def atomic_folder(path: Path, manifest: str, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder to put files in; on success they become `path`, on an exception they vanish.

    manifest: the file without which no reader takes the folder for complete. A new folder appears by one
    rename, and its manifest after it. An existing one keeps its other files: its manifest goes first, then
    files that match the `stale` patterns, then the new files come in, the manifest last. So at any moment,
    whatever kills the process, a folder that has its manifest is complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    last = partial.with_suffix(".manifest")
    partial.mkdir()
    try:
        yield partial
        (partial / manifest).rename(last)
        _sync(last)
        for item in [*partial.rglob("*"), partial]:
            _sync(item)
        if path.exists():
            _move_into(partial, path, manifest, stale)
        else:
            partial.rename(path)
        _sync(path)
        last.replace(path / manifest)
        _sync(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        last.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def replaced_on_success(path: Path) -> Iterator[None]:
    """Put what is at `path` aside while it is written anew; it comes back on an exception, else it goes.

    A killed process leaves it under its temporary name, which ends in .old.
    """
    aside = _partial(path).with_suffix(".old")
    existed = os.path.lexists(path)
    if existed:
        path.rename(aside)
    try:
        yield
    except BaseException:
        if existed:
            _remove(path)
            aside.rename(path)
        raise
    if existed:
        _remove(aside)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, with a final newline."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object. Raises FormatError where it cannot be read or holds anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read as JSON: {error}. Download it again.") from error
    if not isinstance(data, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(data).__name__}. Download it again.")
    return data


def _move_into(partial: Path, path: Path, manifest: str, stale: Sequence[str]) -> None:
    """Put the files of a folder into another one, which is without its manifest meanwhile."""
    (path / manifest).unlink(missing_ok=True)
    _sync(path)
    for pattern in stale:
        for file in path.glob(pattern):
            if not file.is_dir():
                file.unlink()
    for item in sorted(partial.rglob("*")):
        target = path / item.relative_to(partial)
        if item.is_dir():
            target.mkdir(exist_ok=True)
        else:
            item.replace(target)
    for folder in [item for item in path.rglob("*") if item.is_dir()]:
        _sync(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
