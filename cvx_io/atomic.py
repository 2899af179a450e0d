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

    A new folder appears by one rename. An existing one keeps its other files: its manifest goes first, then
    those that match the `stale` patterns, then the new files come in, the manifest last. So at any moment a
    folder that has its manifest is complete. The files are flat: no sub-folders.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.mkdir()
    try:
        yield partial
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        if path.exists():
            _move_into(partial, path, manifest, stale)
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, with a final newline."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _move_into(partial: Path, path: Path, manifest: str, stale: Sequence[str]) -> None:
    (path / manifest).unlink(missing_ok=True)
    _sync(path)
    for pattern in stale:
        for file in path.glob(pattern):
            file.unlink()
    for file in sorted(partial.iterdir(), key=lambda file: (file.name == manifest, file.name)):
        if file.name == manifest:
            _sync(path)
        file.replace(path / file.name)
    _sync(path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
