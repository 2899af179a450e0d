"""What torch.save files hold, tensors by reference: a zip of one pickle and a file per storage. No torch.

The layout: `<stem>/data.pkl`, `<stem>/data/<key>` stored uncompressed, `<stem>/byteorder`.
Source: pytorch/pytorch caffe2/serialize/inline_container.h, torch/serialization.py.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cvx_core.errors import FormatError
from cvx_core.interfaces import TensorInfo, Tensors
from cvx_io.tensors.dtypes import size_of
from cvx_io.tensors.shards import check_shard, read_index, weights_file
from cvx_io.tensors.stored import Stored
from cvx_io.tensors.unpickle import Storage, TensorRef, load

_LOCAL = struct.Struct("<4s22xHH")


def load_pickle(path: Path, start: int = 0, length: int | None = None) -> Any:
    """Return what a torch.save file holds, each tensor as a Stored, foreign objects as inert stand-ins.

    start, length: the part of the file that is the archive, all by default. Runs nothing from the file.
    Raises FormatError where it is damaged, or in torch's format from before version 1.6.
    """
    with path.open("rb") as file:
        part = _Part(file, start, length) if start or length is not None else file
        try:
            with zipfile.ZipFile(part) as archive:
                return _Archive(path, start, file, archive).content()
        except (
            zipfile.BadZipFile,
            EOFError,
            OSError,
            KeyError,
            ValueError,
            struct.error,
            zlib.error,
            RuntimeError,
        ) as error:
            raise FormatError(_damaged(path, file, error)) from error


def state_of(tree: Mapping[str, Any], where: str) -> dict[str, Stored]:
    """Return a mapping of tensors as it is. Raises FormatError where it holds anything else."""
    wrong = [name for name, value in tree.items() if not isinstance(value, Stored)]
    if wrong:
        raise FormatError(
            f"{where}: {len(wrong)} entries are no tensors, first {wrong[0]!r}: {tree[wrong[0]]!r:.80}. "
            "Is it a training state, not weights?"
        )
    return dict(tree)


def as_tensors(state: Mapping[str, Stored]) -> Tensors:
    """Return stored tensors as a source of tensors, in the order in which they lie in their files."""
    order = sorted(state, key=lambda name: (state[name].file, state[name].offset))
    return Tensors({name: state[name].info for name in order}, lambda name: state[name].load())


def open_pickle(path: Path) -> Tensors:
    """Return one state dict: a .bin or .pt file, shards with an index file, or a folder with either."""
    file = weights_file(path)
    if file.suffix != ".json":
        return _state_file(file)
    shard_of = read_index(file)
    found: dict[str, TensorInfo] = {}
    parts: dict[str, Tensors] = {}
    for shard in dict.fromkeys(shard_of.values()):
        stored = _state_file(shard)
        check_shard(file, shard, (name for name, owner in shard_of.items() if owner == shard), stored.index)
        found |= stored.index
        parts |= dict.fromkeys(stored.index, stored)
    return Tensors(found, lambda name: parts[name].load(name))


def _state_file(path: Path) -> Tensors:
    if not zipfile.is_zipfile(path) and _looks_legacy(path):
        return _legacy(path)
    tree = load_pickle(path)
    if not isinstance(tree, Mapping):
        raise FormatError(
            f"{path}: expected a mapping from names to tensors. Is it a training state, not weights?"
        )
    return as_tensors(state_of(tree, str(path)))


def _looks_legacy(path: Path) -> bool:
    """Tell whether a file begins as torch.save did before version 1.6: with a pickled magic number."""
    with path.open("rb") as file:
        return file.read(15).startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19")


def _legacy(path: Path) -> Tensors:
    """Read the old format through torch, which holds all of it in memory."""
    import torch

    from cvx_io.pieces import describe

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damage leads to
        raise FormatError(
            f"{path}: in torch's format from before version 1.6, and cannot be read as plain tensors: "
            f"{type(error).__name__}. If the file is complete, save its tensors again with torch.save."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise FormatError(
            f"{path}: expected a mapping from names to tensors. Is it a training state, not weights?"
        )
    return Tensors({name: describe(tensor) for name, tensor in state.items()}, lambda name: state[name])


@dataclass
class _Archive:
    path: Path
    start: int
    file: IO[bytes]
    archive: zipfile.ZipFile
    stem: str = ""

    def content(self) -> Any:
        names = [name for name in self.archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise FormatError(f"{self.path}: a zip without data.pkl, so no torch.save file. Check the path.")
        self.stem = names[0].removesuffix("data.pkl")
        order = f"{self.stem}byteorder"
        if order in self.archive.namelist() and self.archive.read(order) != b"little":
            raise FormatError(f"{self.path}: big-endian tensors. Save it again on a little-endian machine.")
        return self._resolve(load(self.archive.read(names[0]), str(self.path)), {})

    def _resolve(self, tree: Any, seen: dict[int, Any]) -> Any:
        """Replace references to tensors by where they lie, in plain containers at any depth."""
        if isinstance(tree, TensorRef):
            return self._stored(tree)
        if isinstance(tree, list | tuple):
            return type(tree)(self._resolve(value, seen) for value in tree)
        if isinstance(tree, dict):
            if id(tree) not in seen:
                seen[id(tree)] = made = {}
                made.update({key: self._resolve(value, seen) for key, value in tree.items()})
            return seen[id(tree)]
        return tree

    def _stored(self, ref: TensorRef) -> Stored:
        begin, size = self._place(ref.storage)
        width = size_of(ref.info.dtype)
        contiguous = _is_contiguous(ref.info.shape, ref.stride)
        stored = Stored(self.path, begin + ref.offset * width, ref.info, None if contiguous else ref.stride)
        if ref.offset * width + stored.extent > size:
            raise FormatError(
                f"{self.path}: a tensor of shape {list(ref.info.shape)} reaches beyond its storage "
                f"{ref.storage.key!r} of {size} bytes. Download or save the file again."
            )
        return stored

    def _place(self, storage: Storage) -> tuple[int, int]:
        """Return where in the file a storage's bytes begin, and how many there are."""
        entry = self.archive.getinfo(f"{self.stem}data/{storage.key}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise FormatError(f"{self.path}: {entry.filename} is compressed. Save it again with torch.save.")
        at = self.start + entry.header_offset
        self.file.seek(at)
        mark, name_length, extra_length = _LOCAL.unpack(self.file.read(_LOCAL.size))
        begin = at + _LOCAL.size + name_length + extra_length
        if mark != b"PK\x03\x04" or begin + entry.file_size > self.path.stat().st_size:
            raise FormatError(
                f"{self.path}: {entry.filename} is not where the archive's directory says. "
                "Download or save the file again."
            )
        return begin, entry.file_size


class _Part:
    """A part of an open file that looks like a file of its own, as zipfile wants it."""

    def __init__(self, file: IO[bytes], start: int, length: int | None):
        end = file.seek(0, 2)
        self.file, self.start = file, start
        self.length = end - start if length is None else length
        self.position = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, self.length)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def seekable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        left = max(self.length - self.position, 0)
        self.file.seek(self.start + self.position)
        data = self.file.read(left if count is None or count < 0 else min(count, left))
        self.position += len(data)
        return data


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1 and step != expected:
            return False
        expected *= length
    return True


def _damaged(path: Path, file: IO[bytes], error: Exception) -> str:
    size = file.seek(0, 2)
    return (
        f"{path}: not a torch.save file, or cut short ({size} bytes): {error}. "
        "Download or save it again; files from before torch 1.6 must be saved again with a current torch."
    )
