"""Where one tensor lies in a file, and reading it from there. No torch until a tensor is read.

Each tensor has a memory map of its own, which goes when the tensor does: reading a file of any size holds
only the tensors that are in use, and those in pages that the system may drop.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from cvx_core.errors import FormatError
from cvx_core.interfaces import TensorInfo
from cvx_io.tensors.behind import Room
from cvx_io.tensors.dtypes import size_of

if TYPE_CHECKING:
    from torch import Tensor

MOST_OPEN = 16
"""Files that a Reader keeps open."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. offset: of its first element, in bytes; stride: in elements, None if contiguous."""

    file: Path
    offset: int
    info: TensorInfo
    stride: tuple[int, ...] | None = None

    @property
    def extent(self) -> int:
        """Bytes from the first element to the end of the last one."""
        shape = self.info.shape
        if 0 in shape:
            return 0
        if self.stride is None:
            return math.prod(shape) * size_of(self.info.dtype)
        last = sum((length - 1) * step for length, step in zip(shape, self.stride, strict=True))
        return (last + 1) * size_of(self.info.dtype)

    def load(self) -> Tensor:
        """Return the tensor; its pages are read when touched, and private to this process.

        Raises FormatError where the file has become shorter.
        """
        import torch

        shape, dtype = self.info.shape, getattr(torch, self.info.dtype)
        if self.extent == 0:
            return torch.empty(shape, dtype=dtype)
        start = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as file:
            try:
                pages = mmap.mmap(
                    file.fileno(), self.offset + self.extent - start, access=mmap.ACCESS_COPY, offset=start
                )
            except ValueError as error:
                raise FormatError(f"{self.file}: was changed meanwhile: {error}. Start again.") from error
        skip, size = self.offset - start, size_of(self.info.dtype)
        if skip % size:
            raw = torch.frombuffer(pages, dtype=torch.uint8, offset=skip, count=self.extent)
            flat = raw.clone().view(dtype)  # a copy is aligned
        else:
            flat = torch.frombuffer(pages, dtype=dtype, offset=skip, count=self.extent // size)
            _remember(flat, pages, Run(self.file, self.offset, self.extent))
        return flat.view(shape) if self.stride is None else flat.as_strided(shape, self.stride)


class Run(NamedTuple):
    """Bytes of a file."""

    file: Path
    offset: int
    size: int


class Reader:
    """Reads runs, and opens a file once: the system reads ahead the better the longer it is read in order."""

    def __init__(self) -> None:
        self._files: dict[Path, IO[bytes]] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def chunks(self, run: Run, room: Room) -> Iterator[memoryview]:
        """Yield the bytes of a run, read into the room that is given; use each chunk before the next.

        Reading costs a third less than touching the pages of a map. Raises FormatError where the file ends.
        """
        file, at, end = self._open(run.file), run.offset, run.offset + run.size
        while at < end:
            chunk = room()[: end - at]
            count = os.preadv(file.fileno(), [chunk], at)
            if not count:
                raise FormatError(f"{run.file}: ends {end - at} bytes early. Was it changed meanwhile?")
            yield chunk[:count]
            at += count

    def _open(self, path: Path) -> IO[bytes]:
        if path not in self._files:
            if len(self._files) == MOST_OPEN:
                self._files.pop(next(iter(self._files))).close()
            self._files[path] = path.open("rb", buffering=0)
        return self._files[path]


_runs: dict[int, Run] = {}
"""Where loaded tensors come from, by the address of their memory map, for as long as it lives."""


def _remember(tensor: Tensor, pages: mmap.mmap, run: Run) -> None:
    address = tensor.untyped_storage().data_ptr()
    _runs[address] = run
    weakref.finalize(pages, _runs.pop, address, None)


def run_of(tensor: Tensor) -> Run | None:
    """Return the bytes of a file that a tensor is, unchanged and in order; None where it is anything else."""
    run = _runs.get(tensor.untyped_storage().data_ptr())
    if run is None or not tensor.is_contiguous() or tensor._version:
        return None
    begin = int(tensor.storage_offset()) * tensor.element_size()
    return Run(run.file, run.offset + begin, tensor.numel() * tensor.element_size())
