"""The trackers of a run: what one of them cannot do is counted and said, and costs the run nothing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cvx_core.errors import CvxError
from cvx_core.interfaces import Deps, Tracker
from cvx_core.registry import Choice
from cvx_core.spec import Spec

log = logging.getLogger("cvx")


class Tracking:
    """The trackers that a recipe names; on the first rank only."""

    def __init__(self, choices: Sequence[Choice], spec: Spec, step: int):
        """Start them. Raises CvxError where one cannot start: no step has been made yet that could be lost.

        step: the one the run goes on from.
        """
        self._failed: Counter[str] = Counter()
        self._trackers: dict[str, Tracker] = {}
        for choice in choices:
            tracker: Tracker = choice.build(Deps(spec))
            try:
                tracker.start(step)
            except Exception as error:  # whatever a package raises
                self.close()
                raise CvxError(
                    f"tracker {choice.name!r} cannot start: {type(error).__name__}: {error}. Mend that, or "
                    "take it out of task.trackers."
                ) from error
            self._trackers[choice.name] = tracker

    def scalars(self, step: int, values: Mapping[str, object]) -> None:
        """Show those of the values that are numbers."""
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        self._each(lambda tracker: tracker.scalars(step, numbers))

    def video(self, step: int, name: str, path: Path) -> None:
        """Show an mp4 file."""
        self._each(lambda tracker: tracker.video(step, name, path))

    def close(self) -> None:
        """Close them, and say how often one has failed."""
        self._each(lambda tracker: tracker.close())
        for name, count in self._failed.items():
            log.warning("tracker %r failed %d times; log.jsonl has everything", name, count)

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in self._trackers.items():
            try:
                call(tracker)
            except Exception as error:  # such as a network that is down: hours of training must not end by it
                self._failed[name] += 1
                if self._failed[name] == 1:
                    log.warning("tracker %r: %s: %s; the run goes on", name, type(error).__name__, error)
