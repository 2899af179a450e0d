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
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo

from cvx_core.disk import in_words
from cvx_core.errors import FormatError
from cvx_core.mesh import Mesh
from cvx_io.atomic import atomic_folder, is_left_over
from cvx_io.checksums import DamagedError, check_content, check_sizes, listing
from cvx_io.tensors.dcp_metadata import METADATA, Checkpoint, Place, read_checkpoint

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
    it leaves goes with the next save. Raises CvxError where the disk does not take it.
    With a mesh of several ranks all of them call this; each writes what it holds, the first the manifest.
    group: of all ranks, to agree in; torch's default one by default.
    """
    path = folder / f"step-{step:08d}"
    alone = mesh is None or mesh.degrees.world == 1
    first = mesh is None or mesh.is_first
    if first:
        _clear(folder, path)
    context = atomic_folder(path, MANIFEST) if first else nullcontext()
    with in_words(folder.parent), context as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that no process group is there
        partial = _agreed(made, alone, group)
        dcp.save(dict(state), checkpoint_id=partial, process_group=group, no_dist=alone)
        files = _listed(partial, mesh, group)
        if first:
            manifest = {"step": step, "files": files, **record}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for old in complete(folder)[:-keep] if first else ():
        shutil.rmtree(old)
    if not alone:
        dist.barrier(group)
    return path


def _listed(partial: Path, mesh: Mesh | None, group: dist.ProcessGroup | None) -> dict[str, dict[str, Any]]:
    """Return the account of all files; each rank reads those that it wrote."""
    if mesh is None or mesh.degrees.world == 1:
        return listing(sorted(partial.iterdir()))
    own = sorted(partial.glob(f"__{mesh.rank}_*"))
    told: list[Any] = [None] * mesh.degrees.world
    dist.all_gather_object(told, listing([*own, partial / METADATA] if mesh.is_first else own), group=group)
    return {name: facts for rank in told for name, facts in sorted(rank.items())}


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


def find(folder: Path, resume: str | Path, mesh: Mesh | None = None) -> Path | None:
    """Return the checkpoint that `resume` means: none, the newest sound one of the folder (auto), or the one
    at a path.

    With `auto`, a damaged one is set aside, with a warning, and the one before it is taken. All ranks call
    this and share the reading. Raises FormatError where the path holds no checkpoint or a damaged one, where
    all are damaged, or where `none` would write over an earlier run.
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
        return _newest_sound(folder, here, mesh)
    path = Path(resume)
    if not (path / MANIFEST).exists():
        inside = complete(path) or complete(path / "checkpoints")
        if not inside:
            raise FormatError(f"{path}: holds no checkpoint. Give a step-... folder, or the folder of a run.")
        path = inside[-1]
    if (fault := damage(path, mesh)) is not None:
        raise DamagedError(fault)
    return path


def damage(path: Path, mesh: Mesh | None = None) -> str | None:
    """Return what is wrong with a checkpoint's manifest and files, None where they are what was written.

    Reads every byte once; ranks of a mesh share the files among themselves, and return the same.
    """
    fault = None
    alone = mesh is None or mesh.degrees.world == 1
    rank, world = (0, 1) if mesh is None else (mesh.rank, mesh.degrees.world)
    try:
        listed = read_manifest(path)["files"]
        check_content(path, {name: listed[name] for name in sorted(listed)[rank::world]})
    except DamagedError as error:
        fault = str(error)
    if alone:
        return fault
    faults: list[Any] = [None] * world
    dist.all_gather_object(faults, fault)
    return next((text for text in faults if text is not None), None)


def _newest_sound(folder: Path, here: Sequence[Path], mesh: Mesh | None) -> Path | None:
    """Return the newest checkpoint that is not damaged; the damaged ones after it are set aside."""
    names = _interrupted(folder, here)
    faults: dict[Path, str] = {}
    sound = None
    for path in reversed(here):
        if (fault := damage(path, mesh)) is None:
            sound = path
            break
        faults[path] = fault
    if faults and sound is None:
        raise DamagedError(
            f"{folder}: all {len(faults)} checkpoints are damaged, so nothing was started: "
            f"{'; '.join(faults.values())} Copy them again, or set another output to start afresh."
        )
    if mesh is None or mesh.is_first:
        goes_on = f"goes on from {sound.name}" if sound is not None else "starts from the beginning"
        for name in names:
            log.warning("saving %s was interrupted, so the run %s", name, goes_on)
        for path, fault in faults.items():
            log.warning("DAMAGED CHECKPOINT, kept as %s; the run %s: %s", _aside(path).name, goes_on, fault)
    if faults and mesh is not None:
        mesh.barrier()
    return sound


def _aside(path: Path) -> Path:
    """Give a damaged checkpoint a name that no run takes for a checkpoint, nor removes; returns it."""
    number = 1
    while (aside := path.with_name(f"damaged-{path.name}" + (f"-{number}" if number > 1 else ""))).exists():
        number += 1
    path.rename(aside)
    return aside


def _interrupted(folder: Path, here: Sequence[Path]) -> list[str]:
    """Return the checkpoints newer than the complete ones, `here`, whose save was begun."""
    begun = (_BEGUN.match(path.name) for path in (folder.iterdir() if folder.is_dir() else ()))
    names = {match[1] for match in begun if match}
    return sorted(name for name in names if not here or name > here[-1].name)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest. Raises DamagedError where it is none, or where files are missing or of
    another size.
    """
    file = path / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        step, listed = int(manifest["step"]), manifest["files"]
        known = {name: (int(said["bytes"]), str(said["crc32"])) for name, said in listed.items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DamagedError(
            f"{file}: is no manifest ({error!r}), so the checkpoint is damaged. Resume from an earlier one."
        ) from error
    if f"step-{step:08d}" != path.name and _NAME.match(path.name):
        raise DamagedError(f"{file}: is the manifest of step {step}. Give the folder its own name again.")
    if METADATA not in known or any(Path(name).name != name for name in known):
        raise DamagedError(
            f"{file}: lists no {METADATA} beside plain file names. Resume from an earlier one."
        )
    check_sizes(path, listed)
    return manifest


def restore(path: Path, state: dict[str, Any], mesh: Mesh | None = None, left: Sequence[str] = ()) -> None:
    """Fill `state` in place from a checkpoint. Runs nothing that its files name.

    left: top-level names of which the checkpoint may hold more than is wanted.

    With a mesh, each pipeline stage reads its own part; collective over `pp`. Raises FormatError, before
    anything is read, where the checkpoint holds other names or shapes; and where a file is damaged or holds
    anything but tensors and plain values.
    """
    checkpoint = read_checkpoint(path)
    unread = {name for name in checkpoint.tensors if name.partition(".")[0] in left}
    _check_fit(checkpoint, state, _elsewhere(state, mesh) | unread)
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
            plain = torch.load(value, weights_only=True)
        except Exception as error:  # torch raises whatever the damage leads to
            name = read_item.dest_index.fqn
            raise ValueError(f"{name!r} is no plain value: {_reason(error)}") from error
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], plain)
        else:
            self.state_dict[read_item.dest_index.fqn] = plain


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
            "Resume with the recipe it was made by: the same model, adapter and optimizer."
        )


def _flat(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))
