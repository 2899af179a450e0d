"""Training state on disk: one folder per step in torch's distributed checkpoint format, its manifest written
last.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from cvx_core.errors import FormatError
from cvx_io.atomic import atomic_folder

MANIFEST = "manifest.json"
_NAME = re.compile(r"^step-(\d{8})$")


def save(folder: Path, step: int, state: Mapping[str, Any], record: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint of `state` (nested dicts of tensors and numbers) and drop all but the newest `keep`.

    record: small JSON facts kept in the manifest. A killed save leaves no folder that `newest` returns.
    """
    path = folder / f"step-{step:08d}"
    if path.exists():
        shutil.rmtree(path)
    with atomic_folder(path, MANIFEST) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that no process group is there
        dcp.save(dict(state), checkpoint_id=partial, no_dist=True)
        files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        manifest = {"step": step, "files": files, **record}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def complete(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder that have their manifest, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _NAME.match(path.name) and (path / MANIFEST).exists())


def find(folder: Path, resume: str | Path) -> Path | None:
    """Return the checkpoint that `resume` means: none, the newest of the folder (auto), or the one at a path.

    Raises FormatError where the path holds no checkpoint, or where `none` would write over an earlier run.
    """
    here = complete(folder)
    if resume == "none":
        if here:
            raise FormatError(
                f"{folder} holds checkpoints up to {here[-1].name} of an earlier run. "
                "Set task.resume=auto to go on from there, or another output."
            )
        return None
    if resume == "auto":
        return here[-1] if here else None
    path = Path(resume)
    if (path / MANIFEST).exists():
        return path
    inside = complete(path) or complete(path / "checkpoints")
    if not inside:
        raise FormatError(f"{path}: holds no checkpoint. Give a step-... folder, or the folder of a run.")
    return inside[-1]


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest. Raises FormatError where files are missing or of another size."""
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    for name, size in manifest["files"].items():
        file = path / name
        actual = file.stat().st_size if file.exists() else None
        if actual != size:
            state = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
            raise FormatError(f"{file}: {state}, so the checkpoint is damaged. Resume from an earlier one.")
    return manifest


def restore(path: Path, state: dict[str, Any]) -> None:
    """Fill `state` in place from a checkpoint.

    Raises FormatError, before anything is read, where the checkpoint holds other names or shapes.
    """
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    wanted = dict(_flat(state))
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    shapes = {name: tuple(getattr(stored[name], "size", ())) for name in wanted.keys() & stored.keys()}
    misshaped = sorted(name for name, shape in shapes.items() if shape != tuple(_shape(wanted[name])))
    if missing or extra or misshaped:
        found = [
            f"{len(names)} {what}, first {names[0]!r}"
            for what, names in (
                ("missing", missing),
                ("not expected", extra),
                ("of another shape", misshaped),
            )
            if names
        ]
        raise FormatError(
            f"{path}: does not fit this recipe: {'; '.join(found)}. Resume with the recipe it was made by."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=path, no_dist=True)


def _flat(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))
