"""Training state on disk: one folder per step in torch's distributed checkpoint format, its manifest written
last.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as meta
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo

from cvx_core.errors import FormatError
from cvx_core.mesh import Mesh
from cvx_io.atomic import atomic_folder, is_left_over
from cvx_io.tensors.dcp_metadata import Checkpoint, Place, read_checkpoint

MANIFEST = "manifest.json"
_NAME = re.compile(r"^step-(\d{8})$")
_BEGUN = re.compile(r"^\.?(step-\d{8})\b")
"""The folder of a save, complete or not."""
log = logging.getLogger("cvx")


def save(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    record: Mapping[str, Any],
    keep: int,
    mesh: Mesh | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint of `state` (nested dicts of tensors and numbers) and drop all but the newest `keep`.

    record: small JSON facts kept in the manifest. A killed save leaves nothing that `complete` returns; what
    it leaves goes with the next save.
    With a mesh of several ranks all of them call this; each writes what it holds, the first the manifest.
    group: of all ranks, to agree in; torch's default one by default.
    """
    path = folder / f"step-{step:08d}"
    alone = mesh is None or mesh.degrees.world == 1
    first = mesh is None or mesh.is_first
    if first:
        _clear(folder, path)
    context = atomic_folder(path, MANIFEST) if first else nullcontext()
    with context as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that no process group is there
        partial = _agreed(made, alone, group)
        dcp.save(dict(state), checkpoint_id=partial, process_group=group, no_dist=alone)
        if first:
            files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
            manifest = {"step": step, "files": files, **record}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for old in complete(folder)[:-keep] if first else ():
        shutil.rmtree(old)
    if not alone:
        dist.barrier(group)
    return path


def _clear(folder: Path, path: Path) -> None:
    """Remove what is at the path of a new checkpoint, and what killed saves left."""
    for item in folder.iterdir() if folder.is_dir() else ():
        left_over = _BEGUN.match(item.name) and is_left_over(item)
        if item == path or left_over:
            shutil.rmtree(item) if item.is_dir() else item.unlink()


def _agreed(partial: Path | None, alone: bool, group: dist.ProcessGroup | None) -> Path:
    """Return the folder that the first rank made."""
    if alone:
        assert partial is not None
        return partial
    told = [partial]
    dist.broadcast_object_list(told, src=0, group=group)
    assert told[0] is not None
    return told[0]


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
        for name in _interrupted(folder, here):
            goes_on = f"goes on from {here[-1].name}" if here else "starts from the beginning"
            log.warning("saving %s was interrupted, so the run %s", name, goes_on)
        return here[-1] if here else None
    path = Path(resume)
    if (path / MANIFEST).exists():
        return path
    inside = complete(path) or complete(path / "checkpoints")
    if not inside:
        raise FormatError(f"{path}: holds no checkpoint. Give a step-... folder, or the folder of a run.")
    return inside[-1]


def _interrupted(folder: Path, here: Sequence[Path]) -> list[str]:
    """Return the checkpoints newer than the complete ones, `here`, whose save was begun."""
    begun = (_BEGUN.match(path.name) for path in (folder.iterdir() if folder.is_dir() else ()))
    names = {match[1] for match in begun if match}
    return sorted(name for name in names if not here or name > here[-1].name)


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


def restore(path: Path, state: dict[str, Any], mesh: Mesh | None = None) -> None:
    """Fill `state` in place from a checkpoint. Runs nothing that its files name.

    With a mesh, each pipeline stage reads its own part; collective over `pp`. Raises FormatError, before
    anything is read, where the checkpoint holds other names or shapes; and where a file is damaged or holds
    anything but tensors and plain values.
    """
    checkpoint = read_checkpoint(path)
    _check_fit(checkpoint, state, _elsewhere(state, mesh))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dcp.load(state, storage_reader=_Reader(checkpoint), planner=_PlainValues(), no_dist=True)
        except CheckpointException as error:  # no Exception, so that nothing else would handle it
            cause = next(iter(error.failures.values()))[0]
            if not isinstance(cause, Exception):
                raise cause from error
            raise FormatError(
                f"{path}: cannot be read: {_reason(cause)}. Resume from an earlier checkpoint."
            ) from cause


class _Reader(dcp.FileSystemReader):
    """Torch's reader of files, without its pickle.load of .metadata."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint.path)
        self._checkpoint = checkpoint

    def read_metadata(self) -> meta.Metadata:
        """Return, in torch's classes, what was read and checked before."""
        entries: dict[str, Any] = {name: meta.BytesStorageMetadata() for name in self._checkpoint.objects}
        places = {meta.MetadataIndex(name): _info(at) for name, at in self._checkpoint.objects.items()}
        for name, saved in self._checkpoint.tensors.items():
            boxes = [
                meta.ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                for chunk in saved.chunks
            ]
            properties = meta.TensorProperties(getattr(torch, saved.info.dtype))
            entries[name] = meta.TensorStorageMetadata(properties, torch.Size(saved.info.shape), boxes)
            for chunk in saved.chunks:
                places[meta.MetadataIndex(name, chunk.offsets)] = _info(chunk.place)
        return meta.Metadata(entries, storage_data=places, storage_meta=meta.StorageMeta())


class _PlainValues(dcp.DefaultLoadPlanner):
    """Torch's planner, except that a value which is no tensor may not be anything that runs on loading."""

    def load_bytes(self, read_item: dcp.planner.ReadItem, value: io.BytesIO) -> None:
        try:
            torch.load(value, weights_only=True)
        except Exception as error:  # torch raises whatever the damage leads to
            name = read_item.dest_index.fqn
            raise ValueError(f"{name!r} is no plain value: {_reason(error)}") from error
        value.seek(0)
        super().load_bytes(read_item, value)


def _reason(error: Exception) -> str:
    """Say why torch refused an archive; its own words advise to run whatever the archive holds."""
    if isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL (\S+)", str(error))
        return f"it asks for {named[1]!r}, which was not run" if named else "it holds more than plain values"
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def _info(place: Place) -> _StorageInfo:
    return _StorageInfo(place.file.name, place.start, place.length)


def _elsewhere(state: Mapping[str, Any], mesh: Mesh | None) -> set[str]:
    """Return the names that all pipeline stages hold together."""
    if mesh is None or (group := mesh.group("pp")) is None:
        return set()
    names: list[Any] = [None] * mesh.size("pp")
    dist.all_gather_object(names, [name for name, _ in _flat(state)], group=group)
    return {name for stage in names for name in stage}


def _check_fit(checkpoint: Checkpoint, state: Mapping[str, Any], elsewhere: Collection[str]) -> None:
    """Compare names and shapes. elsewhere: names that other ranks read."""
    wanted = dict(_flat(state))
    stored = {name: saved.info.shape for name, saved in checkpoint.tensors.items()}
    stored |= dict.fromkeys(checkpoint.objects, ())
    missing, extra = (
        sorted(wanted.keys() - stored.keys()),
        sorted(stored.keys() - wanted.keys() - set(elsewhere)),
    )
    both = wanted.keys() & stored.keys()
    misshaped = sorted(name for name in both if stored[name] != tuple(_shape(wanted[name])))
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
            f"{checkpoint.path}: does not fit this recipe: {'; '.join(found)}. "
            "Resume with the recipe it was made by."
        )


def _flat(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))
