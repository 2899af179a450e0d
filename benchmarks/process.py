"""Measuring a command from outside: wall and CPU time, and its peak of private memory (Linux)."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_EVERY_S = 0.02
MOST_FILLED = 64 * 2**30
"""Where more memory than this is free, filling it would take longer than the measurements."""


@dataclass(frozen=True)
class Usage:
    """What a command took. cpu_s: of all its threads; private_bytes: its peak of anonymous memory."""

    wall_s: float
    cpu_s: float
    private_bytes: int
    output: str


def run(command: Sequence[str | Path]) -> Usage:
    """Run a command to its end in the project's folder. Raises CalledProcessError where it fails.

    Memory mapped from files is not counted: the system takes it back whenever it is needed elsewhere.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        begin = time.perf_counter()
        child = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        watch = _Watch(child.pid)
        watch.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
            wall = time.perf_counter() - begin
            child.returncode = os.waitstatus_to_exitcode(status)
        finally:
            watch.ended.set()
            watch.join()
            if child.returncode is None:
                child.kill()
                child.wait()
        output.seek(0)
        text = output.read()
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command, text)
    return Usage(wall, usage.ru_utime + usage.ru_stime, watch.peak, text)


class _Watch(threading.Thread):
    """Samples the private memory of a process until `ended` is set."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.peak, self.ended = pid, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(SAMPLE_EVERY_S):
            self.peak = max(self.peak, private_bytes(self.pid))


def private_bytes(pid: int | str) -> int:
    """Return the anonymous resident memory of a process; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def files_of(path: Path) -> list[Path]:
    """Return a file alone, or all files below a folder."""
    return sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    return sum(file.stat().st_size for file in files_of(path))


@contextmanager
def full_memory(folder: Path, source: Path) -> Iterator[None]:
    """Keep free memory filled with cached pages of an empty file in `folder`, and none of `source` cached.

    Then whatever runs meanwhile reads `source` from the disk, and makes room for each page it caches, as on
    a machine that has been up for long. Without this, the time of one and the same copy varies sixfold:
    virtual machines hand free memory back to their host, and are slow to get it again.
    """
    for file in files_of(source):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = bytearray(2**24)
    with tempfile.TemporaryFile(dir=folder) as filler:
        filler.truncate(min(_available_memory(), MOST_FILLED))  # holes: takes no space on the disk
        while filler.readinto(buffer):
            pass
        yield


def _available_memory() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
