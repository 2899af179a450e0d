"""Lazy reading of state dicts saved by torch.save, without running code from the file."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvx_core.errors import FormatError
from cvx_core.interfaces import TensorInfo
from cvx_io.regroup import describe
from cvx_io.tensors.shards import check_shard, read_index, weights_file

if TYPE_CHECKING:
    from torch import Tensor


def load_pickle(path: Path) -> Any:
    """Return what a torch.save file holds, its tensors mapped into memory and not yet read.

    Only tensors and plain containers are allowed. Raises FormatError on anything else, and on damaged files.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(
            f"{path}: cannot be read as a torch.save file of plain tensors: {reason} "
            "If the file is complete, save its tensors again with the current torch.save, or as .safetensors."
        ) from error


class PickleReader:
    """One state dict in a .bin file, in shards with an index file, or in a folder with either."""

    def __init__(self, path: Path):
        self.path = weights_file(path)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        if self.path.suffix != ".json":
            return _state(self.path)
        shard_of = read_index(self.path)
        found: dict[str, Tensor] = {}
        for shard in dict.fromkeys(shard_of.values()):
            stored = _state(shard)
            check_shard(
                self.path, shard, (name for name, owner in shard_of.items() if owner == shard), stored
            )
            found |= stored
        return found

    def index(self) -> dict[str, TensorInfo]:
        """Return shape and dtype of every tensor."""
        return {name: describe(tensor) for name, tensor in self._tensors.items()}

    def read(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors in the order of `names` (all by default); pages of the file are read when touched."""
        tensors = self._tensors
        for name in tensors if names is None else names:
            yield name, tensors[name]


def _state(path: Path) -> dict[str, Tensor]:
    import torch

    state = load_pickle(path)
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise FormatError(
            f"{path}: expected a mapping from names to tensors. Is it a training state, not weights?"
        )
    return dict(state)
