"""LayerZero shards: a file per rank, each parameter a run of its elements. Read only.

Source: MindSpeed mindspeed/core/distributed/layerzero/state/.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvx_core import FormatError
from cvx_core.interfaces import TensorInfo, Tensors
from cvx_io.layout import Part, assemble
from cvx_io.rename import IDENTITY, Names
from cvx_io.tensors.pickles import load_pickle
from cvx_io.tensors.stored import Stored
from cvx_plugins.formats import LayerZeroConfig

if TYPE_CHECKING:
    from torch import Tensor

_FILE = re.compile(r"model_(\d+)\.pt")
WRAPPERS = ("_zero3_wrapped_module.", "_checkpoint_wrapped_module.")


class LayerZero:
    """The `layerzero` format."""

    def __init__(self, cfg: LayerZeroConfig):
        self.weights = cfg.weights

    def accepts(self, path: Path) -> bool:
        """Tell whether `path` is an iteration's folder of shards, or holds just one."""
        return path.is_dir() and any(_shards(folder) for folder in (path, *path.glob("iter_*")))

    def open(self, path: Path, names: Names | None = None) -> Tensors:
        """Return whole weights. Raises FormatError where ranks are missing or elements not covered once."""
        folder = _iteration(path)
        try:
            return self._joined(folder, names or IDENTITY)
        except (AttributeError, TypeError, ValueError, LookupError) as error:
            raise FormatError(
                f"{folder}: not laid out as LayerZero's files are: {error!r}. Copy or save them again."
            ) from error

    def _joined(self, folder: Path, table: Names) -> Tensors:
        ranks = [_Shard.of(file, self.weights) for file in _shards(folder)]
        ranks.sort(key=lambda rank: rank.number)
        _check_complete(ranks, folder)
        first = ranks[0]
        degree = {key: int(first.place.get(f"{key}_degree", 1)) for key in ("tp", "pp")}
        grid = [
            [
                _join([r for r in ranks if (r.at("tp"), r.at("pp")) == (t, p)], folder)
                for t in range(degree["tp"])
            ]
            for p in range(degree["pp"])
        ]
        whole = assemble(grid, table, str(folder))
        dropped = dict.fromkeys(first.others, "training state")
        return table.read(Tensors(whole.index, whole.load, {**dropped, **whole.dropped}), str(folder))

    def write(
        self,
        path: Path,
        tensors: Tensors,
        names: Names | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Refuse: only training shards weights in this way."""
        self.check(path, tensors, names)

    def check(self, path: Path, tensors: Tensors, names: Names | None = None) -> None:
        """Raise FormatError, before anything is read or written."""
        raise FormatError(
            f"{path}: LayerZero shards are written by training. Convert to megatron, which MindSpeed loads."
        )


def layerzero_format(cfg: LayerZeroConfig, _deps: Any) -> LayerZero:
    """Build the format; it needs nothing else."""
    return LayerZero(cfg)


@dataclass
class _Shard:
    """One rank's file: its runs of elements, and what the file says about them."""

    file: Path
    runs: dict[str, Stored]
    shapes: Mapping[str, Any]
    place: Mapping[str, Any]
    others: list[str]

    @classmethod
    def of(cls, file: Path, weights: str) -> _Shard:
        tree = load_pickle(file)
        if not isinstance(tree, Mapping) or "shard_state_dict" not in tree or "parallel_state" not in tree:
            raise FormatError(f"{file}: has no 'shard_state_dict', as LayerZero's files do. Check the path.")
        if weights not in tree:
            raise FormatError(f"{file}: holds no {weights!r}. Set weights=model, or use a run that kept it.")
        runs = {_clean(name): value for name, value in tree[weights].items() if isinstance(value, Stored)}
        kept = {weights, "shard_state_dict", "parallel_state"}
        shapes = {_clean(name): info for name, info in tree["shard_state_dict"].items()}
        return cls(file, runs, shapes, tree["parallel_state"], sorted(tree.keys() - kept))

    @property
    def number(self) -> int:
        return int(self.place.get("global_rank", 0))

    def at(self, axis: str) -> int:
        return int(self.place.get(f"{axis}_rank", 0))


def _join(ranks: list[_Shard], folder: Path) -> dict[str, Part]:
    """Return the parameters of one tensor-parallel rank and stage from the ranks that share them."""
    first = ranks[0]
    for rank in ranks:
        if rank.runs.keys() != first.runs.keys():
            raise FormatError(
                f"{rank.file}: holds other names than {first.file.name}. Get all files from one save."
            )
    return {name: _part(name, ranks, folder) for name in first.runs}


def _part(name: str, ranks: list[_Shard], folder: Path) -> Part:
    runs = [rank.runs[name] for rank in ranks]
    info = ranks[0].shapes.get(name)
    if info is None:  # not sharded
        return Part(runs[0].info, runs[0].load)
    shape = tuple(int(length) for length in info.shape)
    held = sum(math.prod(run.info.shape) for run in runs)
    if held != math.prod(shape):
        raise FormatError(
            f"{folder}: {name!r} {list(shape)} has {math.prod(shape)} elements, but the "
            f"{len(ranks)} files hold {held}. Are files missing, or of another save?"
        )
    _check_order(name, ranks)
    return Part(TensorInfo(shape, runs[0].info.dtype), lambda: _concatenated(runs, shape))


def _check_order(name: str, ranks: list[_Shard]) -> None:
    """Check that the runs follow each other, as the files state them."""
    position = 0
    for rank in ranks:
        info, count = rank.shapes[name], math.prod(rank.runs[name].info.shape)
        if count and info.intra_param_start_idx not in (None, position):
            raise FormatError(
                f"{rank.file}: {name!r} is said to start at element {info.intra_param_start_idx}, where "
                f"{position} is next. Are files of different saves mixed?"
            )
        position += count


def _concatenated(runs: list[Stored], shape: tuple[int, ...]) -> Tensor:
    import torch

    filled = [run.load().reshape(-1) for run in runs if math.prod(run.info.shape)]
    flat = filled[0] if len(filled) == 1 else torch.cat(filled)
    return flat.view(shape)


def _check_complete(ranks: list[_Shard], folder: Path) -> None:
    place = ranks[0].place
    world = math.prod(int(place.get(f"{axis}_degree", 1)) for axis in ("tp", "pp", "dp"))
    missing = sorted(set(range(world)) - {rank.number for rank in ranks})
    if missing or len(ranks) != world:
        names = (
            ", ".join(f"model_{number}.pt" for number in missing[:5])
            or f"{len(ranks)} files for {world} ranks"
        )
        raise FormatError(
            f"{folder}: of {world} ranks some are missing or doubled: {names}. Copy all of them."
        )


def _clean(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("predictor.")


def _shards(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("model_*.pt") if _FILE.fullmatch(file.name))


def _iteration(path: Path) -> Path:
    if _shards(path):
        return path
    found = sorted(folder for folder in path.glob("iter_*") if _shards(folder))
    if len(found) != 1:
        what = ", ".join(folder.name for folder in found) or "no iteration with model_*.pt files"
        raise FormatError(f"{path}: holds {what}. Give the folder of one iteration.")
    return found[0]
