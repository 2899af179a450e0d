"""Garbage collection during a long run of steps that are all alike."""

from __future__ import annotations

import gc

SETTLED = 10
"""Steps after which a run has made and imported what it keeps."""


class Collecting:
    """Has full collections leave out what a run keeps. A context; leaving it undoes that.

    A full collection looks at every object there is, most of them parts of imported packages, and takes
    0.2 s; a training run makes one every hundred steps or so. What is made after the first steps is collected
    as ever.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._is_ours = False

    def __enter__(self) -> Collecting:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_ours:
            gc.unfreeze()

    def step(self) -> None:
        """Note that a step has ended."""
        self._steps += 1
        if self._steps == SETTLED and not gc.get_freeze_count():  # else someone else has done it
            gc.collect()  # garbage of the start would stay to the end
            gc.freeze()
            self._is_ours = True
