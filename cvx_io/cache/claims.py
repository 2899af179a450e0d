"""Which process works on which item: locks that go with the process, however that ends. No torch."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from cvx_core.errors import FormatError

_PRESENT = 1 << 61
"""Past every item's place."""


class Claims:
    """Locks of single bytes in one file; an item's is at a place given by its key.

    A disk without locks, as some network disks are, gives every claim: work may then be done twice, and the
    same file is written twice.
    """

    def __init__(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(folder / "claims", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise FormatError(
                f"{folder}: cannot be written: {error.strerror}. Set output to a folder that can."
            ) from error

    def attend(self) -> bool:
        """State that this process adds items, for as long as it does; returns whether that may be now."""
        return self._lock(fcntl.LOCK_SH, _PRESENT)

    def alone(self) -> bool:
        """Keep others from adding items; returns whether none does."""
        return self._lock(fcntl.LOCK_EX, _PRESENT)

    def take(self, key: str) -> bool:
        """Claim an item for this process; returns whether that worked."""
        return self._lock(fcntl.LOCK_EX, _place(key))

    def give(self, key: str) -> None:
        """Give a claim back."""
        fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, _place(key))

    def close(self) -> None:
        """Give everything back."""
        os.close(self._handle)

    def _lock(self, how: int, place: int) -> bool:
        try:
            fcntl.lockf(self._handle, how | fcntl.LOCK_NB, 1, place)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)
        return True


def _place(key: str) -> int:
    return int(key[:15], 16)
