"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from cvx_core.world import World

log = logging.getLogger("cvx")


class Progress(Protocol):
    def step(self, note: str = "", by: int = 1) -> None: ...


class _Lines:
    """Prints a line every `interval_s` seconds, and at the end."""

    def __init__(self, what: str, total: int, done: int, in_bytes: bool, interval_s: float = 10.0):
        self._what, self._total, self._done, self._interval_s = what, total, done, interval_s
        self._show = size_text if in_bytes else str
        self._last = time.monotonic()

    def step(self, note: str = "", by: int = 1) -> None:
        self._done += by
        now = time.monotonic()
        if self._done == self._total or now - self._last >= self._interval_s:
            self._last = now
            log.info("%s %s/%s  %s", self._what, self._show(self._done), self._show(self._total), note)


class _Bar:
    def __init__(self, bar: object, task: object):
        self._bar, self._task = bar, task

    def step(self, note: str = "", by: int = 1) -> None:
        self._bar.update(self._task, advance=by, note=note)  # type: ignore[attr-defined]


@contextmanager
def progress(what: str, total: int, done: int = 0, in_bytes: bool = False) -> Iterator[Progress]:
    """Show how far a loop of `total` steps, or bytes, is; call step() after each. Of several processes only
    the first has a bar.
    """
    if not sys.stdout.isatty() or World.stated().rank > 0:
        yield _Lines(what, total, done, in_bytes)
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as RichProgress

    counts = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    columns = (
        TextColumn(what),
        BarColumn(),
        *counts,
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns) as bar:
        yield _Bar(bar, bar.add_task(what, total=total, completed=done, note=""))


def size_text(size: float) -> str:
    """Return a number of bytes for people: 11.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
