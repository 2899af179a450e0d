"""interleave: encodes a round of batches, then moves the encoders out of the way until the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from cvx_core.errors import CvxError
from cvx_core.interfaces import Deps, Parts, Work
from cvx_plugins.parallel.interleave_config import InterleaveConfig


class Interleave:
    """Wraps `parts.encode`. Each piece of work keeps its own cursor, so that a run resumes where it was."""

    def __init__(self, config: InterleaveConfig, deps: Deps):
        self._config = config

    def apply(self, parts: Parts) -> Parts:
        """Replace `encode`. Raises CvxError where the task has none."""
        encode = parts.encode
        if encode is None:
            raise CvxError("interleave: the task does not train on encoded batches. Remove this strategy.")
        modules = [parts.text_encoder, parts.autoencoder]

        def move(device: object) -> None:
            for module in modules if self._config.offload else ():
                module.to(device)

        def in_rounds(works: Iterator[Work]) -> Iterator[Work]:
            while round_ := list(islice(works, self._config.rounds)):
                move(parts.device)
                ready = list(encode(iter(round_)))
                move("cpu")
                yield from ready

        return replace(parts, encode=in_rounds)
