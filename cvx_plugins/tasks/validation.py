"""Validation in a training run: when it is due, in which state the model is for it, and what it finds.

It draws from generators of its own and leaves weights, mode and torch's generator as they were, so that
training is bit for bit what it would be without.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from cvx_core.interfaces import Parts
from cvx_core.spec import Spec
from cvx_parallel.data_parallel import reshard
from cvx_plugins.tasks.held_out import HeldOut
from cvx_plugins.tasks.validation_config import ValidationConfig
from cvx_plugins.tasks.validation_videos import Videos

log = logging.getLogger("cvx")
FAILED = "validation/failed"
"""What every line of a validation in log.jsonl has: how many things went wrong."""


class Validated(NamedTuple):
    """What a validation found, by name; and its videos side by side, if there are any."""

    exact: dict[str, Any]
    grid: Path | None


class Validation:
    """The validations of one run. Every rank takes part, and all return the same."""

    def __init__(self, config: ValidationConfig, last: int, parts: Parts, spec: Spec):
        """Read rows, prompts and images, so that a fault in them ends the run before its first step.

        last: the last step of the run.
        """
        self._config, self._last, self._parts = config, last, parts
        self._output, self._folder = spec.output, spec.output / "validation"
        self._done: int | None = None
        self._loss = HeldOut(config.loss, parts, spec) if config.loss is not None else None
        self._videos = Videos(config.videos, parts, spec, self._folder) if config.videos is not None else None

    def begin(self, step: int) -> None:
        """Take up a run at a step, 0 for a new one: drop what is past it, and have the base's videos ready.

        Called when the log is cut back to the step.
        """
        told: list[Any] = [step > 0 and _is_logged(self._output / "log.jsonl", step)]
        if self._parts.mesh.degrees.world > 1:
            dist.broadcast_object_list(told, src=0)
        self._done = step if told[0] else None
        if self._parts.mesh.is_first:
            _drop_past(self._folder, step)
        if self._videos is not None and self._done != self._last:
            adapter = self._parts.adapter
            without = adapter.off(self._parts.predictor) if hasattr(adapter, "off") else None
            with self._at_rest():
                self._tell(self._videos.begin(step, without), "the base's videos")

    def is_due(self, step: int) -> bool:
        """Tell whether there is one after a step: every so many, after the last, and before the first if
        that is asked for; not again after a resume.
        """
        if step == 0:
            return self._config.at_start
        return step != self._done and (step % self._config.every == 0 or step == self._last)

    def __call__(self, step: int, what: str) -> Validated:
        """Validate with the weights as they are. what: what they are, such as "average". Collective."""
        exact: dict[str, Any] = {}
        faults: list[str] = []
        grid = None
        with self._at_rest():
            if self._loss is not None:
                losses, faults = self._loss.measure()
                exact |= losses
            if self._videos is not None:
                grid, more = self._videos.make(step, f"{what}, step {step}")
                faults = [*faults, *more]
        self._tell(faults, f"validation after step {step}")
        if self._loss is not None and self._parts.mesh.is_first:
            log.info("validation after step %d: loss %.5f", step, exact.get("validation/loss", float("nan")))
        return Validated({**exact, "validation/weights": what, FAILED: len(faults)}, grid)

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Have the predictor as sampling has it, and leave everything as it was."""
        predictor = self._parts.predictor
        was_training = predictor.training
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            predictor.eval()
            reshard(predictor)
            try:
                yield
            finally:
                reshard(predictor)  # else what was gathered would stay, whatever is done to the weights
                predictor.train(was_training)

    def _tell(self, faults: list[str], where: str) -> None:
        if faults and self._parts.mesh.is_first:
            log.warning("%s: %d went wrong: %s. The run goes on.", where, len(faults), "; ".join(faults[:5]))


def _is_logged(path: Path, step: int) -> bool:
    if not path.exists():
        return False
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return any(line["step"] == step and FAILED in line for line in lines)


def _drop_past(folder: Path, step: int) -> None:
    """Remove the validations past a step, of a new run all of them, as the log drops their lines."""
    for path in folder.glob("step-*"):
        found = re.fullmatch(r"step-(\d{6,})(\.mp4|\.json)?", path.name)
        if found is None or (step and int(found[1]) <= step):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
