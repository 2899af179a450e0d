"""Files written in a thread of their own, so that the next bytes are read and cut in the meantime.

Whole blocks at multiples of their size are written, whatever is put in: there the system caches a file in
pages as large as it has, which costs it a fraction of what small or unaligned writes do (Linux, ext4).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BLOCKS = 2
BLOCK_SIZE = 2 << 20

Room = Callable[[], memoryview]
"""Gives memory of the next bytes of a file; what is put there and then written need not be copied."""


class WriteBehind:
    """A file that is appended to, with what zipfile needs of one; what has been written can be changed.

    An error of the system is raised by a later call.
    """

    def __init__(self, handle: int, worker: ThreadPoolExecutor):
        self._handle, self._worker = handle, worker
        self._waiting: deque[Future[None]] = deque()
        self._ring = deque(bytearray(BLOCK_SIZE) for _ in range(BLOCKS))
        self._start = self._filled = self._position = 0

    def room(self) -> memoryview:
        """Return the rest of the current block, at least one byte."""
        return memoryview(self._ring[0])[self._filled :]

    def write(self, data: Any) -> int:
        """Append bytes, or put them over earlier ones where `seek` has gone back."""
        view = memoryview(data).cast("B")
        self._put_over(view) if self._position < self._end else self._append(view)
        self._position += len(view)
        return len(view)

    def writelines(self, chunks: Iterable[Any]) -> None:
        """Write one after the other; none of them is held any more when this returns."""
        for chunk in chunks:
            self.write(chunk)

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        assert position <= self._end
        self._position = position
        return position

    def seekable(self) -> bool:
        return True

    def flush(self) -> None:
        """Wait until all is written. Raises OSError where something could not be."""
        self._submit(memoryview(self._ring[0])[: self._filled], self._start)
        self._wait(0)

    @property
    def _end(self) -> int:
        return self._start + self._filled

    def _append(self, view: memoryview) -> None:
        while view:
            count = min(len(view), BLOCK_SIZE - self._filled)
            if view.obj is not self._ring[0]:
                self.room()[:count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == BLOCK_SIZE:
                self._submit(memoryview(self._ring[0]), self._start)
                self._wait(BLOCKS - 1)  # then the next block is free
                self._ring.rotate(-1)
                self._start, self._filled = self._end, 0

    def _put_over(self, view: memoryview) -> None:
        """Change earlier bytes: in the current block, or before it in the file."""
        assert self._position + len(view) <= self._end
        before = max(min(self._start - self._position, len(view)), 0)
        if before:
            self._submit(memoryview(bytes(view[:before])), self._position)
        begin = self._position + before - self._start
        self._ring[0][begin : begin + len(view) - before] = view[before:]

    def _submit(self, data: memoryview, position: int) -> None:
        self._waiting.append(self._worker.submit(_write, self._handle, data, position))

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
