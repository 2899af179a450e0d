"""Where one tensor lies in a file, and reading it from there. No torch until a tensor is read.

Each tensor has a memory map of its own, which goes when the tensor does: reading a file of any size holds
only the tensors that are in use, and those in pages that the system may drop.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cvx_core.errors import FormatError
from cvx_core.interfaces import TensorInfo
from cvx_io.tensors.dtypes import size_of

if TYPE_CHECKING:
    from torch import Tensor


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
        return flat.view(shape) if self.stride is None else flat.as_strided(shape, self.stride)
