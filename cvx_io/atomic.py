"""Writes that are seen whole or not at all: a temporary name, fsync, then a rename."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cvx_core.errors import FormatError

_LEFT_OVER = re.compile(r"\..+\.[0-9a-f]{8}\.(partial|manifest|old)", re.DOTALL)
"""Names that _partial makes, and what they turn into."""


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
    with _new_folder(partial):
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
def staged(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a hidden folder beside `path`; on success it becomes `path`.

    What else lies in that folder then goes beside `path`. What was at `path` stays until the new is complete;
    a process killed between the last renames leaves it whole, under a name that ends in .old. On an exception
    all is as before. Raises FormatError where something appears at `path` meanwhile.
    """
    existed = os.path.lexists(path)
    created = _make_parents(path)
    folder = _partial(path)
    try:
        with _new_folder(folder):
            yield folder / path.name
            if os.path.lexists(path) and not existed:
                raise FormatError(
                    f"{path}: appeared meanwhile, so it is kept. Is another process writing there?"
                )
            aside = _swap(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in created:
            with suppress(OSError):
                parent.rmdir()
        raise
    folder.rmdir()
    _sync(path.parent)
    _remove(aside)


def is_left_over(path: Path) -> bool:
    """Tell whether a path is, or lies in, what a killed process left of a write; it may be half written."""
    return any(_LEFT_OVER.fullmatch(part) for part in path.resolve().parts)


def left_overs(path: Path) -> list[Path]:
    """Return what killed processes left of writes to `path`; see `is_in_use` for that of running ones."""
    if not path.parent.is_dir():
        return []
    start = f".{path.name}."
    beside = (item for item in path.parent.iterdir() if item.name.startswith(start))
    return sorted(item for item in beside if _LEFT_OVER.fullmatch(item.name))


def is_in_use(left_over: Path) -> bool:
    """Tell whether a process may still be writing there: always so of anything but a folder of new files.

    A folder that cannot be locked, as on some network disks, counts as in use.
    """
    if left_over.suffix != ".partial" or not left_over.is_dir():
        return True
    handle = os.open(left_over, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, with a final newline."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_word(path: Path) -> str:
    """Return the text of a file of one line, such as a tracker. Raises FormatError where it is not text."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except ValueError as error:
        raise FormatError(f"{path}: is not text. Copy it again, or write it by hand.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object. Raises FormatError where it cannot be read or holds anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(
            f"{path}: cannot be read: {error.strerror}. Check the path and its permissions."
        ) from error
    except ValueError as error:
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


def _make_parents(path: Path) -> list[Path]:
    """Make the folders above a path; returns those that were not there, the deepest first."""
    created = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return created


def _swap(folder: Path, path: Path) -> Path:
    """Move what is in a folder beside `path`, what has its name last; returns where the old `path` is now."""
    aside = folder.with_suffix(".old")
    if os.path.lexists(path):
        path.rename(aside)
    try:
        for item in sorted(folder.iterdir(), key=lambda item: (item.name == path.name, item.name)):
            item.replace(path.with_name(item.name))
    except BaseException:
        if os.path.lexists(aside):
            aside.rename(path)
        raise
    return aside


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


@contextmanager
def _new_folder(path: Path) -> Iterator[None]:
    """Make a folder that is locked meanwhile; the lock goes with the process, however that ends."""
    path.mkdir()
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
