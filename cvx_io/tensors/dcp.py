"""Torch's distributed checkpoints (DCP): a folder with .metadata and .distcp files, tensors by reference.

A tensor is saved in chunks, each a torch.save archive of its own within a .distcp file. Reading runs nothing
from any of them, and opens no chunk before it is needed. No torch until a tensor is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cvx_core.errors import FormatError
from cvx_core.interfaces import TensorInfo, Tensors
from cvx_io.pieces import describe
from cvx_io.regroup import listed
from cvx_io.tensors.archive import ALIGNMENT
from cvx_io.tensors.dcp_metadata import METADATA, Checkpoint, Chunk, Saved, read_checkpoint
from cvx_io.tensors.dtypes import SIZES, size_of
from cvx_io.tensors.pickles import load_pickle
from cvx_io.tensors.stored import Stored

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".distcp"


def open_dcp(path: Path, prefix: str = "") -> Tensors:
    """Return the tensors of a checkpoint's folder, or those named `prefix.NAME` as NAME.

    A tensor saved whole is a memory map; one saved in chunks is put together when it is loaded. Objects that
    are no tensors are dropped. Raises FormatError as read_checkpoint and part_of do.
    """
    return part_of(read_checkpoint(path), prefix)


def part_of(checkpoint: Checkpoint, prefix: str = "") -> Tensors:
    """Return the tensors named `prefix.NAME` as NAME; all of them, under their names, by default.

    Raises FormatError where there is none, or where one has a dtype that cannot be read.
    """
    start = f"{prefix}." if prefix else ""
    stored = checkpoint.tensors
    chosen = {name[len(start) :]: saved for name, saved in stored.items() if name.startswith(start)}
    if prefix and not chosen:
        parts = sorted({name.partition(".")[0] for name in stored})
        raise FormatError(
            f"{checkpoint.path}: no tensor under {prefix!r}. Names start with: {listed(parts)}."
        )
    for name, saved in chosen.items():
        if saved.info.dtype not in SIZES:
            raise FormatError(
                f"{checkpoint.path}: {start + name!r} is {saved.info.dtype}, which cannot be read. "
                f"Save it as one of: {', '.join(SIZES)}."
            )
    dropped = dict.fromkeys(checkpoint.objects, "not a tensor")
    dropped |= {name: f"not under {prefix!r}" for name in stored if not name.startswith(start)}
    order = sorted(chosen, key=lambda name: [chunk.place for chunk in chosen[name].chunks[:1]])
    return Tensors(
        {name: chosen[name].info for name in order},
        lambda name: _assemble(start + name, chosen[name]),
        dropped,
        {name: (start + name,) for name in order} if start else {},
    )


def write_dcp(folder: Path, tensors: Tensors) -> None:
    """Write a checkpoint that torch's `dcp.load` reads, one tensor in memory at a time; .metadata comes last.

    torch's own `dcp.save` would hold all tensors of a file until it is complete. Raises FormatError where a
    tensor is not what the index says.
    """
    import torch
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint import metadata as meta
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.storage import WriteResult

    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Any] = {}
    results = []
    with (folder / f"__0_0{SUFFIX}").open("wb") as file:
        for name, info in tensors.index.items():
            file.write(bytes(-file.tell() % ALIGNMENT))  # so that what is aligned in the archive stays so
            start = file.tell()
            _save(_compact(name, tensors.load(name), info), file)
            length = file.tell() - start
            size, zero = torch.Size(info.shape), torch.Size([0] * len(info.shape))
            properties = meta.TensorProperties(getattr(torch, info.dtype))
            entries[name] = meta.TensorStorageMetadata(
                properties, size, [meta.ChunkStorageMetadata(zero, size)]
            )
            index = meta.MetadataIndex(name, zero, 0)
            results.append(WriteResult(index, length, _StorageInfo(Path(file.name).name, start, length)))
    paths = {name: (name,) for name in entries}  # the keys that lead to each in the state dict
    FileSystemWriter(folder, sync_files=False).finish(meta.Metadata(entries, paths), [results])


def _save(tensor: Tensor, file: IO[bytes]) -> None:
    """Write a tensor's archive. Raises OSError where the disk is full, which torch hides behind another."""
    import torch

    try:
        torch.save(tensor, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def _compact(name: str, tensor: Tensor, expected: TensorInfo) -> Tensor:
    """Return a tensor that owns no more bytes than it has elements for, as torch.save writes all of them."""
    if describe(tensor) != expected:
        raise FormatError(
            f"{name!r} is {describe(tensor)}, but its source announced {expected}. Was it changed meanwhile?"
        )
    size_of(expected.dtype)
    plain = tensor.detach().to("cpu").contiguous()
    return plain if plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()


def _assemble(name: str, saved: Saved) -> Tensor:
    """Return a tensor as it lies in the file, or put together in memory."""
    import torch

    if len(saved.chunks) == 1:
        return _stored(name, saved, saved.chunks[0]).load()
    whole = torch.empty(saved.info.shape, dtype=getattr(torch, saved.info.dtype))
    for chunk in saved.chunks:
        box = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[box] = _stored(name, saved, chunk).load()
    return whole


def _stored(name: str, saved: Saved, chunk: Chunk) -> Stored:
    """Open the archive of a chunk. Raises FormatError where it holds anything else."""
    file, start, length = chunk.place
    found = load_pickle(file, start, length)
    expected = TensorInfo(chunk.sizes, saved.info.dtype)
    if not isinstance(found, Stored) or found.info != expected:
        what = found.info if isinstance(found, Stored) else repr(found)
        raise FormatError(
            f"{file}: a chunk of {name!r} at byte {start} is {what}, but {METADATA} says {expected}. "
            "Are the files of different checkpoints? Copy or save all of them again."
        )
    return found
