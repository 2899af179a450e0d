"""Lazy reading of safetensors: shapes and dtypes from headers, tensors one by one from a memory map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvx_core.interfaces import TensorInfo
from cvx_io.tensors.header import read_header
from cvx_io.tensors.shards import check_shard, read_index, weights_file

if TYPE_CHECKING:
    from torch import Tensor


class SafetensorsReader:
    """One state dict in a .safetensors file, in shards with an index file, or in a folder with either.

    Raises FormatError where files are missing, damaged or contradict each other, before any tensor is read.
    """

    def __init__(self, path: Path):
        self.path = weights_file(path)

    @cached_property
    def _index(self) -> dict[str, tuple[Path, TensorInfo]]:
        if self.path.suffix != ".json":
            return {name: (self.path, info) for name, info in read_header(self.path).items()}
        shard_of = read_index(self.path)
        found: dict[str, tuple[Path, TensorInfo]] = {}
        for shard in dict.fromkeys(shard_of.values()):
            stored = read_header(shard)
            check_shard(
                self.path, shard, (name for name, owner in shard_of.items() if owner == shard), stored
            )
            found |= {name: (shard, info) for name, info in stored.items()}
        return found

    def index(self) -> dict[str, TensorInfo]:
        """Return shape and dtype of every tensor, from the headers."""
        return {name: info for name, (_, info) in self._index.items()}

    def read(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors in the order of `names` (all by default), on the CPU.

        A tensor is a private view of the mapped file: its pages are read when touched.
        """
        from safetensors import safe_open

        index = self._index
        with ExitStack() as stack:
            handles: dict[Path, Any] = {}
            for name in index if names is None else names:
                file = index[name][0]
                if file not in handles:
                    handles[file] = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                yield name, handles[file].get_tensor(name)
