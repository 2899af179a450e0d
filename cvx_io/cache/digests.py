"""Digests of files, read again only when the system says that a file has changed. No torch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cvx_core.errors import FormatError
from cvx_io.atomic import write_text

log = logging.getLogger("cvx")
_AT_ONCE = 1 << 22


class Digests:
    """A memory of digests in a JSON file; without one it lasts as long as the object.

    A file counts as unchanged while its size, inode and times of change are; ctime cannot be set back.
    """

    def __init__(self, memory: Path | None = None):
        self._memory = memory
        self._known: dict[str, Any] = {}
        self._is_new = False
        if memory is not None and memory.is_file():
            with suppress(OSError, ValueError):  # a memory that cannot be read is made again
                self._known = dict(json.loads(memory.read_text(encoding="utf-8")))

    def of(self, path: Path) -> str:
        """Return the SHA-256 of a file, as 64 hex digits. Raises FormatError where it cannot be read."""
        return self.remember(str(path), [path], lambda: file_digest(path))

    def remember(self, name: str, files: Iterable[Path], compute: Callable[[], str]) -> str:
        """Return what `compute` gave for `name` while none of the files has changed since."""
        state = [_state(file) for file in files]
        known = self._known.get(name)
        if isinstance(known, list) and len(known) == 2 and known[0] == state:
            return str(known[1])
        value = compute()
        self._known[name] = [state, value]
        self._is_new = True
        return value

    def save(self) -> None:
        """Write the memory, with what other processes have written meanwhile. A folder that cannot be
        written leaves it as it was.
        """
        if self._memory is None or not self._is_new:
            return
        merged = {**Digests(self._memory)._known, **self._known}
        try:
            write_text(self._memory, json.dumps(merged))
        except OSError as error:
            log.warning("%s: not kept (%s); files are read again next time", self._memory, error.strerror)
        self._is_new = False


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes. Raises FormatError where it cannot be read."""
    digest, buffer = hashlib.sha256(), bytearray(_AT_ONCE)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
    except OSError as error:
        raise FormatError(
            f"{path}: cannot be read: {error.strerror}. Fetch it again or drop its row."
        ) from error
    return digest.hexdigest()


def files_under(path: Path) -> list[Path]:
    """Return a file itself, or all files in a folder, sorted."""
    return [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())


def tree_digest(path: Path, digests: Digests) -> str:
    """Return a digest of a file, or of the names and bytes of all files in a folder."""
    if path.is_file():
        return digests.of(path)
    listed = [(str(file.relative_to(path)), digests.of(file)) for file in files_under(path)]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _state(path: Path) -> list[int]:
    try:
        found = os.stat(path)  # noqa: PTH116 (twice as quick, and there may be a million)
    except OSError as error:
        raise FormatError(
            f"{path}: cannot be read: {error.strerror}. Fetch it again or drop its row."
        ) from error
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _unreadable(path: Path, error: OSError) -> FormatError:
    return FormatError(f"{path}: cannot be read: {error.strerror}. Fetch it again or drop its row.")
