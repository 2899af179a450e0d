"""Signs of life of the ranks of a run, and who is at fault by them. No clock, thread or store here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["running", "torn", "failed", "done", "left"]
"""torn: a collective failed, so a peer may be gone; failed: of its own fault; done: waits for the others;
left: all are done, so no more signs are due.
"""

SILENT_S = 20.0
"""Seconds without a sign of life after which a rank is gone; where collectives fail already, TORN_S."""
TORN_S = 3.0


@dataclass(frozen=True)
class Beat:
    """A sign of life. count: grows with each, 0 before the first; progress, what: the latest mark; at: where
    the main thread is; waits: whether that is inside communication.
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

    def last(self, rank: int) -> Beat:
        """Return the newest beat of a rank that was seen."""
        return self._beats[rank]

    def verdict(self, now: float) -> str | None:
        """Return who is at fault and how, in a sentence for each, or None."""
        return self.fallen(now) or self._stalled(now)

    def fallen(self, now: float, torn: bool = False) -> str | None:
        """Return which ranks have failed or are gone; None where there are none. torn: see TORN_S."""
        present = {rank: beat for rank, beat in self._beats.items() if beat.status != "left"}
        failed = [rank for rank, beat in present.items() if beat.status == "failed"]
        if failed:
            return " ".join(f"{self._names[rank]} failed: {present[rank].why}." for rank in failed)
        torn = torn or any(beat.status == "torn" for beat in present.values())
        silent_s = min(TORN_S if torn else SILENT_S, self._timeout_s)
        limits = {rank: silent_s if beat.count else self._timeout_s for rank, beat in present.items()}
        silent = [rank for rank, limit_s in limits.items() if now - self._beat_at[rank] > limit_s]
        return " ".join(self._gone(rank, now) for rank in silent) or None

    def _gone(self, rank: int, now: float) -> str:
        what = self._beats[rank].what
        after = f", last in {what}" if what else ""
        return f"{self._names[rank]} is gone: not heard of for {now - self._beat_at[rank]:.0f} s{after}."

    def _stalled(self, now: float) -> str | None:
        """Name the ranks furthest behind where some have stood too long; those with no mark may."""
        running = {rank: beat for rank, beat in self._beats.items() if beat.status not in ("done", "left")}
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
