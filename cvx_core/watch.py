"""While ranks run: each shows signs of life in a key-value store that the first one holds, and watches.

A rank that dies, fails or stands still is named, and all the others end. Two threads per rank; they need no
collective, so they speak while the main thread waits in one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cvx_core.errors import CvxError, SaidError
from cvx_core.judge import Beat, Judge, Status

BEAT_S = 0.5
GRACE_S = 8.0
"""Seconds that a rank whose collective failed waits for the first to name the one at fault."""
LAST_BEATS = 4
"""For how many beats a rank that fails goes on, so that the others hear why."""
_SIGNS = ("gloo", "nccl", "hccl", "connection", "timed out", "process group", "broken pipe", "socket")


class Watch:
    """This rank's signs of life, and on the first rank the judge of all. Ends with the run.

    One thread talks with the store: where the first rank stops or its host vanishes, a call to it never
    returns, so no other thread makes any. The other, the guard, looks at what has come and ends the process.

    store: set, compare_set, multi_get; of its own, since a thread uses it. names: by rank, for messages.
    speaks: whether this rank may print for its host. leave: how the process ends.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        names: Sequence[str],
        timeout_s: float,
        speaks: bool = True,
        leave: Callable[[int], Any] = os._exit,
    ):
        self._store, self._rank, self._names, self._speaks, self._leave = store, rank, names, speaks, leave
        self._heard = range(len(names)) if rank == 0 else range(1)  # whose beats this rank reads
        self._judge = Judge(names, timeout_s)
        self._beat_s = min(BEAT_S, timeout_s / 10)
        self._count = self._progress = 0
        self._what, self._why = "", ""
        self._status: Status = "running"
        self._verdict = ""  # as told, or on the first rank to tell
        self._lost = False
        self._main = threading.get_ident()
        self._wake, self._over, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._now = 0.0
        self._talker = threading.Thread(target=self._talk, name="cvx-watch-talker", daemon=True)
        self._guard = threading.Thread(target=self._look, name="cvx-watch-guard", daemon=True)

    def start(self) -> None:
        """Begin, on all ranks. Does not wait for the others: one that never shows a sign is named too."""
        for rank in self._heard:
            self._judge.see(rank, Beat(), self._now)
        self._talker.start()
        self._guard.start()

    def mark(self, what: str) -> None:
        """State that this rank gets on, and with what; "" for what may take as long as it likes."""
        self._what = what
        self._progress += 1

    def end(self) -> None:
        """Say that this rank is done, and wait until all are: till then, one that dies or stops is named."""
        self._status = "done"
        self._wake.set()
        self._over.wait()
        self._ended.set()
        self._wake.set()
        self._talker.join(GRACE_S)

    def final(self, error: BaseException) -> BaseException:
        """Tell the others of an error that ends this rank; return the one to raise instead.

        Where it looks like a peer's fault, wait until that is named, which ends the process.
        """
        said = str(error) if isinstance(error, CvxError) else f"{type(error).__name__}: {error}"
        said = said.split("\n")[0].rstrip(".")
        with _no_signals():
            if _of_a_peer(error):
                self._status = "torn"
                self._wake.set()
                self._ended.wait(GRACE_S)
            self._status, self._why = "failed", said
            self._ended.set()
            self._wake.set()
            self._talker.join(GRACE_S)  # which hangs where the store does
        if isinstance(error, CvxError) and self._rank > 0:
            first = self._judge.last(0)
            same = first.status == "failed" and first.why == said
            return SaidError(said) if same else CvxError(f"rank {self._rank}: {error}")
        return error

    def _talk(self) -> None:
        """Show signs of life and read those of others, until the end; the only one to touch the store."""
        try:
            if self._rank == 0:
                self._open()
            while not self._ended.is_set():
                self._wake.clear()
                self._tick()
                self._wake.wait(self._beat_s / (5 if self._status == "left" else 1))
            if self._status == "failed":
                self._part()
        except RuntimeError:  # what torch raises where a connection is closed
            self._lost = True
            if self._rank == 0 or self._judge.last(0).status == "left":
                self._over.set()

    def _open(self) -> None:
        """Put something under each name, so that no later call waits for one."""
        self._store.set("verdict", "")
        for rank in range(len(self._names)):
            self._store.compare_set(f"beat/{rank}", "", _packed(Beat()))

    def _tick(self) -> None:
        self._send()
        if self._rank == 0:
            self._store.set("verdict", self._verdict)
        *beats, verdict = self._store.multi_get([*(f"beat/{rank}" for rank in self._heard), "verdict"])
        self._verdict = verdict.decode() or self._verdict
        for rank, beat in zip(self._heard, beats, strict=True):
            self._judge.see(rank, Beat(**json.loads(beat)), self._now)
        self._over_if_done()

    def _part(self) -> None:
        """Go on for a moment after a failure, until the others have heard of it, or failed themselves."""
        end = time.monotonic() + LAST_BEATS * self._beat_s
        self._tick()
        while time.monotonic() < end and not self._others_are("failed", "done", "left"):
            time.sleep(self._beat_s / 5)
            self._tick()

    def _over_if_done(self) -> None:
        """Let end() return once all are done: the first says so by leaving, and goes when all have left."""
        if self._status == "done" and self._others_are("done" if self._rank == 0 else "left", "left"):
            self._status = "left"
            self._send()
        if self._status == "left" and self._others_are("left"):
            self._over.set()

    def _others_are(self, *status: Status) -> bool:
        return all(self._judge.last(rank).status in status for rank in self._heard if rank != self._rank)

    def _send(self) -> None:
        self._count += 1
        at, waits = _where(self._main)
        beat = Beat(self._count, self._progress, self._what, at, waits, self._status, self._why)
        self._store.set(f"beat/{self._rank}", _packed(beat))

    def _look(self) -> None:
        """Guard: end the process as soon as somebody is at fault. Never waits for the store.

        Its clock leaves out most of a time in which this process did not run itself: nobody is blamed for it.
        """
        before = time.monotonic()
        while not self._ended.wait(self._beat_s / 2):
            now = time.monotonic()
            self._now += min(now - before, LAST_BEATS * self._beat_s)
            before = now
            if self._rank > 0 and self._verdict:
                self._stop("", aloud=False)
            elif (why := self._fault()) is not None:
                self._stop(why, aloud=self._rank == 0 or self._speaks)

    def _fault(self) -> str | None:
        if self._rank == 0:
            return self._judge.verdict(self._now)
        if self._lost and self._judge.last(0).status != "left":
            return f"{self._names[0]} is gone, and with it the store that it holds."
        return self._judge.fallen(self._now, torn=self._status == "torn")

    def _stop(self, why: str, aloud: bool) -> None:
        """End this process, after giving the others time to read why."""
        if aloud:
            print(f"{why} All ranks stop.", file=sys.stderr, flush=True)
        if self._rank == 0:
            self._verdict = why
            self._wake.set()
            time.sleep(LAST_BEATS * self._beat_s)
        self._ended.set()
        self._over.set()
        self._leave(1)


def _packed(beat: Beat) -> str:
    return json.dumps(vars(beat))


def _of_a_peer(error: BaseException) -> bool:
    """Tell whether an error is one of communication."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


def _where(thread: int) -> tuple[str, bool]:
    """Return "file.py:12 in function" of a thread, outside torch, and whether it is inside communication."""
    frame: FrameType | None = sys._current_frames().get(thread)
    waits, at = False, ""
    while frame is not None:
        file = frame.f_code.co_filename
        waits = waits or "torch/distributed/" in file or "/cvx_parallel/" in file
        if not at and "/torch/" not in file:
            at = f"{Path(file).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return at, waits


class _no_signals:  # noqa: N801  # a context, written as one
    """Hold off interrupts and terminations: a launcher sends them as soon as one rank is gone."""

    def __enter__(self) -> None:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, signal.SIG_IGN)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
