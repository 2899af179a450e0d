"""The run's log: log.jsonl with what is exactly reproducible, speed.jsonl with what is not, TensorBoard with
both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class RunLog:
    """Appends one line per logged step. Opened at step N, it drops what an earlier run wrote past N."""

    def __init__(self, folder: Path, step: int, tensorboard: bool):
        folder.mkdir(parents=True, exist_ok=True)
        self._files = {name: folder / f"{name}.jsonl" for name in ("log", "speed")}
        for path in self._files.values():
            _truncate(path, step)
        self._writer = _summary_writer(folder / "tensorboard", step) if tensorboard else None

    def write(self, step: int, exact: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        """Log one step; `exact` must be the same in a repeated run, `speed` may not be."""
        for name, values in (("log", exact), ("speed", speed)):
            with self._files[name].open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in {**exact, **speed}.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the TensorBoard file."""
        if self._writer is not None:
            self._writer.close()


def _truncate(path: Path, step: int) -> None:
    """Keep the lines up to a step, so that a resumed log reads as if it had never stopped."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):  # a line cut off by a crash
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _summary_writer(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
