"""While ranks run: each shows signs of life in a key-value store that the first one holds, and watches.

A rank that dies, fails or stands still is named, and all the others end. One thread per rank; it needs no
collective, so it speaks while the main thread waits in one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from cvx_core.errors import CvxError, SaidError

Status = Literal["running", "torn", "failed", "done"]
"""torn: a collective failed, so a peer may be gone; failed: of its own fault."""

BEAT_S = 0.5
SILENT_S = 20.0
"""Seconds without a sign of life after which a rank is gone; where collectives fail already, TORN_S."""
TORN_S = 3.0
GRACE_S = 8.0
"""Seconds that a rank whose collective failed waits for the first to name the one at fault."""
_SIGNS = ("gloo", "nccl", "hccl", "connection", "timed out", "process group", "broken pipe", "socket")


@dataclass(frozen=True)
class Beat:
    """A sign of life. count: grows with each; progress, what: the latest mark; at: where the main thread is;
    waits: whether that is inside communication.
    """

    count: int = 0
    progress: int = 0
    what: str = ""
    at: str = ""
    waits: bool = False
    status: Status = "running"
    why: str = ""


class Judge:
    """Tells from beats which ranks are at fault. names: by rank, for messages. Knows no clock of its own."""

    def __init__(self, names: Sequence[str], timeout_s: float):
        self._names, self._timeout_s = names, timeout_s
        self._beats: dict[int, Beat] = {}
        self._beat_at: dict[int, float] = {}
        self._progress_at: dict[int, float] = {}

    def see(self, rank: int, beat: Beat, now: float) -> None:
        """Take in a rank's newest beat, which may be the one seen before."""
        before = self._beats.get(rank)
        if before is None or before.count != beat.count:
            self._beat_at[rank] = now
        if before is None or before.progress != beat.progress:
            self._progress_at[rank] = now
        self._beats[rank] = beat

    def verdict(self, now: float) -> str | None:
        """Return who is at fault and how, in a sentence for each, or None."""
        running = {rank: beat for rank, beat in self._beats.items() if beat.status != "done"}
        failed = [rank for rank, beat in running.items() if beat.status == "failed"]
        if failed:
            return " ".join(f"{self._names[rank]} failed: {running[rank].why}." for rank in failed)
        torn = any(beat.status == "torn" for beat in running.values())
        silent_s = min(TORN_S if torn else SILENT_S, self._timeout_s)
        silent = [rank for rank in running if now - self._beat_at[rank] > silent_s]
        if silent:
            return " ".join(self._gone(rank, now) for rank in silent)
        return self._stalled(running, now)

    def _gone(self, rank: int, now: float) -> str:
        what = self._beats[rank].what
        after = f", last in {what}" if what else ""
        return f"{self._names[rank]} is gone: not heard of for {now - self._beat_at[rank]:.0f} s{after}."

    def _stalled(self, running: dict[int, Beat], now: float) -> str | None:
        """Name the ranks furthest behind where some have stood too long; those with no mark may."""
        marked = {rank: beat for rank, beat in running.items() if beat.what}
        still = {r: beat for r, beat in marked.items() if now - self._progress_at[r] > self._timeout_s}
        if not still:
            return None
        least = min(beat.progress for beat in still.values())
        behind = {rank: beat for rank, beat in still.items() if beat.progress == least}
        busy = {rank: beat for rank, beat in behind.items() if not beat.waits} or behind
        return " ".join(
            f"{self._names[rank]} has stood still for {now - self._progress_at[rank]:.0f} s "
            f"in {beat.what}, at {beat.at}."
            for rank, beat in busy.items()
        )


class Watch:
    """This rank's signs of life, and on the first rank the judge of all. A context; ends with the run.

    store: set, multi_get; of its own, since a thread uses it. names: by rank, for messages. speaks: whether
    this rank may print for its host. leave: how the process ends.
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
        self._judge = Judge(names, timeout_s)
        self._beat_s = min(BEAT_S, timeout_s / 10)
        self._count = self._progress = 0
        self._what, self._why = "", ""
        self._status: Status = "running"
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._first_is_done = False
        self._thread = threading.Thread(target=self._run, name="cvx-watch", daemon=True)

    def start(self) -> None:
        """Begin, on all ranks; returns when every rank has given its first sign."""
        self._send()
        if self._rank == 0:
            self._store.set("verdict", "")
        self._store.wait([*(f"beat/{rank}" for rank in range(len(self._names))), "verdict"])
        self._thread.start()

    def mark(self, what: str) -> None:
        """State that this rank gets on, and with what; "" for what may take as long as it likes."""
        self._what = what
        self._progress += 1

    def end(self) -> None:
        """Say that this rank is done; others may go on without it."""
        self._finish("done", "")

    def final(self, error: BaseException) -> BaseException:
        """Tell the others of an error that ends this rank; return the one to raise instead.

        Where it looks like a peer's fault, wait until that is named, which ends the process.
        """
        said = str(error) if isinstance(error, CvxError) else f"{type(error).__name__}: {error}"
        said = said.split("\n")[0].rstrip(".")
        if _of_a_peer(error):
            self._status = "torn"
            with _no_signals():
                self._ended.wait(GRACE_S)
        self._finish("failed", said)
        if isinstance(error, CvxError) and self._rank > 0:
            return SaidError(said) if self._first_says(said) else CvxError(f"rank {self._rank}: {error}")
        return error

    def _finish(self, status: Status, why: str) -> None:
        self._ended.set()
        self._thread.join()
        self._status, self._why = status, why
        with suppress(RuntimeError):  # the first rank and its store may be gone already
            self._send()

    def _first_says(self, said: str) -> bool:
        """Tell whether the first rank ends with the same error; it gets a moment to say so."""
        end = time.monotonic() + 4 * self._beat_s
        with suppress(RuntimeError), _no_signals():
            while time.monotonic() < end:
                first = self._read(0)
                if first.status == "failed":
                    return first.why == said
                time.sleep(self._beat_s / 5)
        return False

    def _run(self) -> None:
        while not self._ended.wait(self._beat_s):
            try:
                self._tick()
            except RuntimeError:
                if not self._ended.is_set() and not self._first_is_done:
                    self._stop(
                        f"{self._names[0]} is gone, and with it the store that it holds.", self._speaks
                    )
                return

    def _tick(self) -> None:
        self._send()
        now = time.monotonic()
        if self._rank == 0:
            keys = [f"beat/{rank}" for rank in range(len(self._names))]
            for rank, value in enumerate(self._store.multi_get(keys)):
                self._judge.see(rank, Beat(**json.loads(value)), now)
            if (verdict := self._judge.verdict(now)) is not None:
                self._store.set("verdict", verdict)
                self._stop(verdict, True)
            return
        first = self._read(0)
        self._first_is_done = first.status == "done"
        self._judge.see(0, first, now)
        if self._status == "torn":
            self._judge.see(self._rank, Beat(self._count, self._progress, status="torn"), now)
        if self._store.get("verdict"):
            self._stop("", False)
        elif not self._first_is_done and (verdict := self._judge.verdict(now)) is not None:
            self._stop(verdict, self._speaks)

    def _send(self) -> None:
        self._count += 1
        at, waits = _where(self._main)
        beat = Beat(self._count, self._progress, self._what, at, waits, self._status, self._why)
        self._store.set(f"beat/{self._rank}", json.dumps(vars(beat)))

    def _read(self, rank: int) -> Beat:
        return Beat(**json.loads(self._store.get(f"beat/{rank}")))

    def _stop(self, why: str, aloud: bool) -> None:
        """End this process, after giving the others time to read why."""
        if aloud:
            print(f"{why} All ranks stop.", file=sys.stderr, flush=True)
        if self._rank == 0:
            time.sleep(4 * self._beat_s)
        self._ended.set()
        self._leave(1)


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
