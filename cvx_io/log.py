"""The run's log: log.jsonl with what is exactly reproducible, speed.jsonl with what is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class RunLog:
    """Appends one line per logged step. Opened at step N, it drops what an earlier run wrote past N; at step
    0 that is everything.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._files = {name: folder / f"{name}.jsonl" for name in ("log", "speed")}
        for path in self._files.values():
            _truncate(path, step)

    def write(self, step: int, exact: Mapping[str, Any], speed: Mapping[str, float] | None = None) -> None:
        """Log one step; `exact` must be the same in a repeated run, `speed` may not be."""
        for name, values in (("log", exact), ("speed", speed)):
            if values is None:
                continue
            with self._files[name].open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")


def _truncate(path: Path, step: int) -> None:
    """Keep the lines up to a step, so that a resumed log reads as if it had never stopped."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if step else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):  # a line cut off by a crash
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)
