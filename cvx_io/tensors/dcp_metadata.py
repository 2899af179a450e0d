"""The .metadata of a distributed checkpoint: the shape of every tensor, its chunks, and where they lie.

It is a pickle; reading it runs nothing that it names, and refuses names that torch's own writer does not use.
No torch.
Source: pytorch/pytorch torch/distributed/checkpoint/metadata.py and filesystem.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cvx_core.errors import FormatError
from cvx_core.interfaces import TensorInfo
from cvx_io.regroup import listed
from cvx_io.tensors.dtypes import SIZES
from cvx_io.tensors.unpickle import Inert, load

METADATA = ".metadata"

_DCP = "torch.distributed.checkpoint"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"  # where torch before 2.3 kept two of them
_TOP = f"{_DCP}.metadata.Metadata"
_TENSOR = f"{_DCP}.metadata.TensorStorageMetadata"
_OBJECT = f"{_DCP}.metadata.BytesStorageMetadata"
_CLASSES = {
    _TOP,
    _TENSOR,
    _OBJECT,
    f"{_DCP}.metadata.ChunkStorageMetadata",
    f"{_DCP}.metadata.MetadataIndex",
    f"{_DCP}.metadata.StorageMeta",
    f"{_DCP}.metadata.TensorProperties",
    f"{_DCP}.metadata._MEM_FORMAT_ENCODING",
    f"{_DCP}.filesystem._StorageInfo",
    f"{_SHARDED}.TensorProperties",
    f"{_SHARDED}.MEM_FORMAT_ENCODING",
    "torch.serialization._get_layout",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
}
"""All that torch's own writer names in .metadata, besides dtypes."""
_ENUMS = (f"{_DCP}.metadata._MEM_FORMAT_ENCODING", f"{_SHARDED}.MEM_FORMAT_ENCODING")
_OTHER_DTYPES = ("complex32", "complex128", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
"""Dtypes that may occur, but that no tensor to be read can have."""


class Place(NamedTuple):
    """The part of a file that is one torch.save archive. start, length: in bytes."""

    file: Path
    start: int
    length: int


class Chunk(NamedTuple):
    """A box within a tensor and where it lies. offsets, sizes: one number per dim."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


class Saved(NamedTuple):
    """A tensor of a checkpoint. chunks: those with elements; they make up the tensor, without overlap."""

    info: TensorInfo
    chunks: tuple[Chunk, ...]


class Checkpoint(NamedTuple):
    """A folder's tensors and, in `objects`, what was saved besides them."""

    path: Path
    tensors: Mapping[str, Saved]
    objects: Mapping[str, Place]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what a checkpoint's folder holds; every chunk's file is there and long enough.

    Raises FormatError where that is not so, where chunks overlap or leave gaps, and where .metadata is
    damaged or names anything that torch's own writer does not.
    """
    file = path / METADATA
    if not file.is_file():
        raise FormatError(
            f"{path}: no file {METADATA} in it, so it is no complete distributed checkpoint. "
            "Give the folder that holds the .distcp files; a hidden file is easily left behind in a copy."
        )
    allowed: dict[tuple[str, str], Any] = {("torch", name): name for name in _OTHER_DTYPES}
    allowed["builtins", "getattr"] = _member
    tree = load(file.read_bytes(), str(file), allowed)
    _refuse_foreign(tree, file)
    try:
        return _parsed(path, tree)
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise FormatError(
            f"{file}: not the metadata of a distributed checkpoint: {error!r}. Copy or save it again."
        ) from error


def _member(owner: Any, name: Any) -> Any:
    """Stand in for getattr, by which some versions of Python pickle the members of an enum."""
    if isinstance(owner, type) and issubclass(owner, Inert) and owner.name in _ENUMS:
        return owner(name)
    return Inert(owner, name)  # a result of a call, which is refused


def _refuse_foreign(tree: Any, file: Path) -> None:
    """Raise FormatError where a pickle holds an object that torch's own writer does not put there."""
    todo, seen = [tree], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        kind = value if isinstance(value, type) else type(value)
        if issubclass(kind, Inert):
            if kind.name not in _CLASSES:
                raise FormatError(
                    f"{file}: asks for {kind.name or 'the result of a call'!r}, which is no part of a torch "
                    "checkpoint and was not run. Do not trust this folder; get it from where it was made."
                )
            todo += [] if value is kind else vars(value).values()
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            todo += value


def _parsed(path: Path, tree: Any) -> Checkpoint:
    if _kind(tree) != _TOP:
        raise TypeError(f"holds {tree!r}")
    places: dict[tuple[str, tuple[int, ...] | None], Place] = {}
    for index, info in tree.storage_data.items():
        offset = getattr(index, "offset", None)
        places[index.fqn, None if offset is None else _counts(offset)] = _place(path, index.fqn, info)
    _check_files(places.values())
    tensors: dict[str, Saved] = {}
    objects: dict[str, Place] = {}
    for name, entry in tree.state_dict_metadata.items():
        if not isinstance(name, str):
            raise TypeError(f"a name is {name!r}")
        if _kind(entry) == _OBJECT:
            objects[name] = places[name, None]
        elif _kind(entry) == _TENSOR:
            tensors[name] = _saved(path, name, entry, places)
        else:
            raise TypeError(f"{name!r} is {entry!r}")
    return Checkpoint(path, tensors, objects)


def _place(path: Path, name: str, info: Any) -> Place:
    if Path(info.relative_path).name != info.relative_path:
        raise FormatError(
            f"{path / METADATA}: {name!r} lies in {info.relative_path!r}, which is not a plain file name. "
            "Files lie beside their metadata."
        )
    if transforms := getattr(info, "transform_descriptors", None):
        raise FormatError(
            f"{path / METADATA}: {name!r} went through {listed([str(step) for step in transforms])} when it "
            "was saved. Save the checkpoint again without compression or other extensions."
        )
    return Place(path / info.relative_path, *_counts((info.offset, info.length)))


def _check_files(places: Iterable[Place]) -> None:
    ends: dict[Path, int] = {}
    for file, start, length in places:
        ends[file] = max(ends.get(file, 0), start + length)
    for file, end in sorted(ends.items()):
        actual = file.stat().st_size if file.is_file() else None
        if actual is None or actual < end:
            what = "is missing" if actual is None else f"was cut short: {actual} bytes instead of {end}"
            raise FormatError(f"{file}: {what}. Copy it again from where the checkpoint was saved.")


def _saved(path: Path, name: str, entry: Any, places: Mapping[Any, Place]) -> Saved:
    shape, dtype = _counts(entry.size), entry.properties.state[0]
    if dtype not in (*SIZES, *_OTHER_DTYPES):
        raise ValueError(f"{name!r} has dtype {dtype!r}")
    chunks = []
    for chunk in entry.chunks:
        offsets, sizes = _counts(chunk.offsets), _counts(chunk.sizes)
        if math.prod(sizes):
            chunks.append(Chunk(offsets, sizes, places[name, offsets]))
    for chunk in chunks:
        if not len(shape) == len(chunk.offsets) == len(chunk.sizes) or any(
            at + size > length for at, size, length in zip(chunk.offsets, chunk.sizes, shape, strict=True)
        ):
            raise ValueError(f"a chunk of {name!r} at {chunk.offsets} lies outside shape {shape}")
    held, total = sum(math.prod(chunk.sizes) for chunk in chunks), math.prod(shape)
    if held < total or _overlap(chunks):
        what = "overlap" if held >= total else f"hold {held} of its {total} elements"
        raise FormatError(
            f"{path / METADATA}: the chunks of {name!r} {what}. Save the checkpoint again, from all ranks."
        )
    return Saved(TensorInfo(shape, str(dtype)), tuple(chunks))


def _overlap(chunks: Sequence[Chunk]) -> bool:
    """Tell whether two boxes share an element: sweep along the dim with most cuts."""
    if len(chunks) < 2:
        return False
    dims = range(len(chunks[0].offsets))
    dim = max(dims, key=lambda dim: len({chunk.offsets[dim] for chunk in chunks}), default=None)
    if dim is None:
        return True  # a scalar saved twice
    reached: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[dim]):
        reached = [other for other in reached if other.offsets[dim] + other.sizes[dim] > chunk.offsets[dim]]
        if any(_meet(chunk, other) for other in reached):
            return True
        reached.append(chunk)
    return False


def _meet(one: Chunk, other: Chunk) -> bool:
    return all(
        a < b + n and b < a + m
        for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"expected counts, got {values!r}")
    return tuple(values)


def _kind(value: Any) -> str:
    """Return what the pickle called an object's class."""
    return type(value).name if isinstance(value, Inert) else type(value).__name__
