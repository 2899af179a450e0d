"""The memory of microbatches that are on their way through a rank's stages of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cvx_parallel.pipeline import Action
from cvx_plugins.plan.passes import Pass


def in_flight(order: Sequence[Action], by_stage: Mapping[int, Pass]) -> int:
    """Return the most bytes at any time of a rank's actions in order; see cvx_parallel.pipeline.Passing.

    Buffers are there from when a receive is begun. What is sent counts until the next thing is.
    """
    flight = _Flight()
    for action in order:
        flight.do(action.kind, by_stage[action.stage])
    return flight.most


class _Flight:
    """Bytes now, at most, and on their way to another rank."""

    def __init__(self) -> None:
        self.now = self.most = self.sent = 0

    def do(self, kind: str, one: Pass) -> None:
        """Do an action of a stage."""
        gradients = one.leaving  # what was received of them; a pass makes as much for itself otherwise
        if kind == "RECV_F":
            self._add(one.arriving)
        elif kind == "RECV_B":
            self._add(one.leaving)
        elif kind == "FORWARD":
            self._add(one.kept - one.arriving)
        elif kind == "BACKWARD_INPUT" and one.arriving:
            self._pass(one.kept + gradients, one.to_inputs, one.between + one.arriving)
        elif kind == "BACKWARD_WEIGHT" and one.arriving:
            self._pass(one.between, one.to_weights, 0)
        elif kind in ("FULL_BACKWARD", "BACKWARD_WEIGHT"):
            self._pass(one.kept + gradients, one.peak, one.arriving)
        elif kind in ("SEND_F", "SEND_B"):
            self.now -= self.sent
            self.sent = one.arriving if kind == "SEND_B" else 0  # outputs are kept in any case

    def _add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)

    def _pass(self, before: int, peak: int, after: int) -> None:
        """Count a pass that finds `before`, takes `peak` at most with it, and leaves `after`."""
        self.now -= before
        self.most = max(self.most, self.now + peak)
        self._add(after)
