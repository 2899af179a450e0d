"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

log = logging.getLogger("cvx")


class Progress(Protocol):
    def step(self, note: str = "") -> None: ...


class _Lines:
    """Prints a line every `interval_s` seconds, and at the end."""

    def __init__(self, what: str, total: int, done: int, interval_s: float = 10.0):
        self._what, self._total, self._done, self._interval_s = what, total, done, interval_s
        self._last = time.monotonic()

    def step(self, note: str = "") -> None:
        self._done += 1
        now = time.monotonic()
        if self._done == self._total or now - self._last >= self._interval_s:
            self._last = now
            log.info("%s %d/%d  %s", self._what, self._done, self._total, note)


class _Bar:
    def __init__(self, bar: object, task: object):
        self._bar, self._task = bar, task

    def step(self, note: str = "") -> None:
        self._bar.update(self._task, advance=1, note=note)  # type: ignore[attr-defined]


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Progress]:
    """Show how far a loop of `total` steps is; call step() after each."""
    if not sys.stdout.isatty():
        yield _Lines(what, total, done)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns) as bar:
        yield _Bar(bar, bar.add_task(what, total=total, completed=done, note=""))
