"""Clips that break, and lists of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path


def damage(path: Path) -> Path:
    """Overwrite a stretch of a clip's coded frames: it states all, and not all can be decoded."""
    data = bytearray(path.read_bytes())
    third = len(data) // 3
    data[third : third + third // 2] = bytes(third // 2)
    path.write_bytes(data)
    return path


def list_clips(folder: Path, files: Iterable[str], root: Path | None = None) -> Path:
    """Write clips.jsonl in a folder, a row per file; ids are the files' stems."""
    start = root if root is not None else folder
    rows = [{"file": str(start / f), "captions": f"a clip {f}", "id": Path(f).stem} for f in files]
    path = folder / "clips.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
