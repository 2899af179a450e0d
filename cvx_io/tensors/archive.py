"""Writing torch.save files with one tensor in memory at a time: the pickle, made from shapes, comes first.

The layout is that of torch.save (see pickles.py); torch.load and older readers take it for one.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from cvx_core.interfaces import TensorInfo
from cvx_io.tensors.behind import WriteBehind, write_behind
from cvx_io.tensors.dtypes import STORAGES, num_bytes, size_of
from cvx_io.tensors.stored import Reader
from cvx_io.tensors.write import chunks

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 64
STEM = "archive"
"""The folder in the zip: what torch.save calls it where it knows no file name. Ours is a temporary one."""
_ZIP64_FIELD = 20
"""Bytes that zipfile adds to an entry's header for sizes beyond 4 GiB."""


class Archive:
    """An open torch.save file; `write` the tensors in the order of its index."""

    def __init__(
        self, file: WriteBehind, entries: zipfile.ZipFile, index: Mapping[str, TensorInfo], reader: Reader
    ):
        self._file, self._zip, self._index, self._reader = file, entries, index, reader
        self._keys = {name: str(key) for key, name in enumerate(index)}

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Write one tensor, given by its pieces along dim 0. Raises FormatError where it is another."""
        info = self._index[name]
        data = chunks(name, pieces, info, self._file.room, self._reader)
        self._entry(f"data/{self._keys[name]}", num_bytes(info), data)

    def add(self, name: str, data: bytes) -> None:
        """Write an entry that is no tensor."""
        self._entry(name, len(data), [data])

    def _entry(self, name: str, size: int, data: Iterable[Any]) -> None:
        info = zipfile.ZipInfo(f"{STEM}/{name}")
        large = size >= 2**31
        begin = self._file.tell() + 30 + len(info.filename.encode()) + (_ZIP64_FIELD if large else 0)
        padding = -(begin + 4) % ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding  # as torch.save pads
        with self._zip.open(info, "w", force_zip64=large) as entry:
            for chunk in data:
                entry.write(chunk)


@contextmanager
def torch_archive(
    path: Path, index: Mapping[str, TensorInfo], wrap: Any = None, reader: Reader | None = None
) -> Iterator[Archive]:
    """Open a torch.save file of the tensors in `index`; each is then written once.

    wrap: given the mapping {name: tensor}, returns what the file is to hold, in plain containers; the mapping
    alone by default. reader: one for archives that are written in turns, from the same files.
    """
    with (
        write_behind(path) as file,
        Reader() if reader is None else nullcontext(reader) as reading,
        _zip(file) as entries,
    ):
        archive = Archive(file, entries, index, reading)
        state = OrderedDict((name, _Slot(str(key), info)) for key, (name, info) in enumerate(index.items()))
        archive.add("data.pkl", _pickled(wrap(state) if wrap is not None else state))
        archive.add("byteorder", b"little")
        yield archive
        archive.add("version", b"3\n")


def _zip(file: WriteBehind) -> zipfile.ZipFile:
    return zipfile.ZipFile(cast(IO[bytes], file), "w", zipfile.ZIP_STORED, allowZip64=True)


class _Slot:
    """A tensor that is yet to be written."""

    def __init__(self, key: str, info: TensorInfo):
        self.key, self.info = key, info


class _Storage:
    def __init__(self, key: str, info: TensorInfo):
        self.key, self.info = key, info


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        count = num_bytes(value.info) // size_of(value.info.dtype)
        kind = _storage_class(value.info.dtype)
        if kind is None:
            import torch

            return ("storage", torch.UntypedStorage, value.key, "cpu", num_bytes(value.info))
        return ("storage", kind, value.key, "cpu", count)

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _Slot):
            return NotImplemented
        import torch

        info, steps = value.info, _strides(value.info.shape)
        storage = _Storage(value.key, info)
        rest: tuple[bool, Any] = (False, OrderedDict())
        if _storage_class(info.dtype) is None:
            dtype = getattr(torch, info.dtype)
            return torch._utils._rebuild_tensor_v3, (storage, 0, info.shape, steps, *rest, dtype)
        return torch._utils._rebuild_tensor_v2, (storage, 0, info.shape, steps, *rest)


def _pickled(tree: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(tree)
    return buffer.getvalue()


def _storage_class(dtype: str) -> Any:
    """Return torch's typed storage of a dtype; None for dtypes that torch saves as untyped bytes."""
    import torch

    return getattr(torch, STORAGES[dtype]) if dtype in STORAGES else None


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    steps: list[int] = []
    step = 1
    for length in reversed(shape):
        steps.append(step)
        step *= max(length, 1)
    return tuple(reversed(steps))
