"""Saving while the run goes on: a copy of the state is taken, and a thread writes it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from cvx_core.mesh import Mesh
from cvx_io import resume

log = logging.getLogger("cvx")


class Saver:
    """Writes the checkpoints of a run, one at a time. A context: on leaving, the last one is complete.

    beside: write in a thread, from a copy in host memory, while the steps go on; else at once. Where a save
    fails, the next call or leaving raises what it raised. On several ranks all of them make the same calls.
    """

    def __init__(self, folder: Path, keep: int, mesh: Mesh, beside: bool):
        self._folder, self._keep, self._mesh, self._beside = folder, keep, mesh, beside
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        several = beside and mesh.degrees.world > 1
        # Of its own: steps use the default group meanwhile, and calls must come in one order on all ranks.
        self._group = dist.new_group(backend="gloo") if several else None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):  # an interrupt does not wait
            self._wait()
        if kind is None:
            self.check()
        elif self._error is not None:
            log.error("the save in the background failed too: %r", self._error)

    def save(self, step: int, state: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Write `state` (nested dicts of tensors and numbers), when the save before is complete.

        record: see resume.save. With `beside`, returns when the state is copied.
        """
        if not self._beside:
            self._write(step, state, record)
            return
        self._wait()
        self.check()
        copied = _copied(state)
        self._thread = threading.Thread(
            target=self._try, args=(step, copied, dict(record)), name="cvx-save", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise what a save in the background has raised, if any; once."""
        if (error := self._error) is not None:
            self._error = None
            raise error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _try(self, step: int, state: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        try:
            self._write(step, state, record)
        except BaseException as error:  # for the thread that runs the steps to raise
            self._error = error

    def _write(self, step: int, state: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        path = resume.save(self._folder, step, state, record, self._keep, self._mesh, self._group)
        log.info("saved %s", path)


def _copied(value: Any) -> Any:
    """Return state with every tensor in host memory of its own; a sharded one stays sharded."""
    if isinstance(value, Mapping):
        return {name: _copied(item) for name, item in value.items()}
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    return value
