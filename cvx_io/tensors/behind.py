"""Files written in a thread of their own, so that the next bytes are read and cut in the meantime."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BUFFERS = 3
BUFFER_SIZE = 2 << 20

Buffer = Callable[[], memoryview]
"""Gives a buffer to fill and to write, before the next is asked for."""


class WriteBehind:
    """An open file with what zipfile needs of one.

    What `write` is given has to stay as it is until BUFFERS more writes; the buffers that `buffer` gives do.
    An error is raised by a later write, or at the end.
    """

    def __init__(self, handle: int, worker: ThreadPoolExecutor):
        self._handle, self._worker = handle, worker
        self._position = self._writes = 0
        self._waiting: deque[Future[None]] = deque()
        self._ring = [memoryview(bytearray(BUFFER_SIZE)) for _ in range(BUFFERS)]

    def buffer(self) -> memoryview:
        """Return a buffer that no write waits for: the one of BUFFERS writes ago."""
        return self._ring[self._writes % BUFFERS]

    def write(self, data: Any) -> int:
        """Have bytes written where the file is; returns once so few writes wait that a buffer is free."""
        view = memoryview(data).cast("B")
        self._waiting.append(self._worker.submit(_write, self._handle, view, self._position))
        self._position += len(view)
        self._writes += 1
        self._wait(BUFFERS - 1)
        return len(view)

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self._position = position
        return position

    def seekable(self) -> bool:
        return True

    def flush(self) -> None:
        """Wait until all is written. Raises OSError where something could not be."""
        self._wait(0)

    def _wait(self, most: int) -> None:
        while len(self._waiting) > most:
            self._waiting.popleft().result()


@contextmanager
def write_behind(path: Path) -> Iterator[WriteBehind]:
    """Open a new file; all is written when the block ends. Raises OSError where the system refuses that."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    worker = ThreadPoolExecutor(1, thread_name_prefix="write")
    try:
        file = WriteBehind(handle, worker)
        yield file
        file.flush()
    finally:
        worker.shutdown(cancel_futures=True)
        os.close(handle)


def _write(handle: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(handle, data, position)
        data, position = data[count:], position + count
