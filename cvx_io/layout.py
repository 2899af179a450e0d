"""Whole tensors from what tensor-parallel ranks and pipeline stages hold, and parts from whole ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cvx_core.errors import FormatError
from cvx_core.interfaces import TensorInfo, Tensors
from cvx_io.pieces import ByPieces, rows, side_by_side
from cvx_io.regroup import listed
from cvx_io.rename import Names, Split

if TYPE_CHECKING:
    from torch import Tensor


class Part(NamedTuple):
    """What one rank holds of a tensor."""

    info: TensorInfo
    load: Callable[[], Tensor]


Rank = Mapping[str, Part]
Grid = Sequence[Sequence[Rank]]
"""Parts by name for every stage, first to last, and in each for every tensor-parallel rank."""


def split_info(name: str, info: TensorInfo, how: Split | None, parts: int, world: int) -> TensorInfo:
    """Return shape and dtype of a rank's part. Raises FormatError where the tensor does not divide."""
    if how is None or world == 1:
        return info
    dim, pieces = (1, world) if how == "row" else (0, world * (parts if how == "per_part" else 1))
    if len(info.shape) <= dim or info.shape[dim] % pieces:
        raise FormatError(
            f"{name!r} {list(info.shape)} cannot be split over tp={world}: dim {dim} does not divide "
            f"by {pieces}. Choose a tp that divides the number of heads and every width."
        )
    shape = list(info.shape)
    shape[dim] //= world
    return TensorInfo(tuple(shape), info.dtype)


def split(pieces: Sequence[Tensor], how: Split | None, parts: int, rank: int, world: int) -> list[Tensor]:
    """Return the pieces of a rank's part of a tensor that divides, as views of the tensor's pieces."""
    if how is None or world == 1:
        return list(pieces)
    if how == "row":
        return [piece.chunk(world, dim=1)[rank] for piece in pieces]
    count = parts if how == "per_part" else 1
    length = sum(map(len, pieces)) // (count * world)
    begins = [(part * world + rank) * length for part in range(count)]
    return [piece for begin in begins for piece in rows(pieces, begin, begin + length)]


def join_info(info: TensorInfo, how: Split | None, world: int) -> TensorInfo:
    """Return shape and dtype of the whole of which `info` is one rank's part."""
    if how is None or world == 1:
        return info
    shape = list(info.shape)
    shape[1 if how == "row" else 0] *= world
    return TensorInfo(tuple(shape), info.dtype)


def join(shards: Sequence[Tensor], how: Split | None, parts: int) -> Iterator[Tensor]:
    """Yield the pieces of the whole of the ranks' parts; of replicas the first."""
    if how is None or len(shards) == 1:
        yield shards[0]
    elif how == "row":
        yield from side_by_side(shards)
    elif how == "column":
        yield from shards
    else:
        for by_rank in zip(*(shard.chunk(parts) for shard in shards), strict=True):
            yield from by_rank


def assemble(grid: Grid, names: Names, where: str, replicas_must_agree: bool = True) -> Tensors:
    """Return whole tensors under foreign names, blocks numbered through all stages.

    replicas_must_agree: compare the copies that several ranks hold when they are loaded. Raises FormatError
    where ranks of a stage hold different names or shapes.
    """
    joined: dict[str, _Joined] = {}
    dropped: dict[str, str] = {}
    first_block = 0
    for number, stage in enumerate(grid):
        _check_ranks(stage, number, where)
        blocks = _blocks(stage[0], names, number, where)
        for name in stage[0]:
            renamed = _renumbered(name, names, first_block)
            shards = [rank[name] for rank in stage]
            if renamed in joined:
                dropped[f"{renamed} (stage {number})"] = "an earlier stage holds it too"
                joined[renamed].copies.extend(shards)
                continue
            joined[renamed] = _Joined(renamed, shards, *_how(renamed, shards, stage[0], names), [], where)
        first_block += blocks
    index = {name: item.info for name, item in joined.items()}
    load = ByPieces(index, lambda name: joined[name].pieces(replicas_must_agree))
    return Tensors(index, load, dropped)


@dataclass
class _Joined:
    name: str
    shards: list[Part]
    how: Split | None
    parts: int
    copies: list[Part]
    where: str

    @property
    def info(self) -> TensorInfo:
        return join_info(self.shards[0].info, self.how, len(self.shards))

    def pieces(self, must_agree: bool) -> Iterator[Tensor]:
        if self.how is None and must_agree:
            self._compare([*self.shards[1:], *self.copies])
        shards = self.shards if self.how is not None else self.shards[:1]
        return join([shard.load() for shard in shards], self.how, self.parts)

    def _compare(self, others: Sequence[Part]) -> None:
        import torch

        first = self.shards[0].load()
        for number, other in enumerate(others, start=1):
            if not torch.equal(first, other.load()):
                raise FormatError(
                    f"{self.where}: the copies of {self.name!r} differ (copy {number} and the first). The "
                    "ranks went apart in training. To take the first copy, give --set-from replicas=first."
                )


def _how(name: str, shards: Sequence[Part], rank: Rank, names: Names) -> tuple[Split | None, int]:
    """Return how a tensor is split; older files hold some tensors whole on each rank."""
    how, parts = names.split_of(name)
    whole = names.whole_rows(name)
    if how is not None and whole is not None and whole[1] in rank and len(shards) > 1:
        times, other = whole
        if shards[0].info.shape[0] == times * rank[other].info.shape[0]:
            return None, parts
    return how, parts


def _check_ranks(stage: Sequence[Rank], number: int, where: str) -> None:
    for rank, held in enumerate(stage):
        different = sorted(held.keys() ^ stage[0].keys())
        if different:
            raise FormatError(
                f"{where}: tensor-parallel ranks 0 and {rank} of stage {number} hold different names: "
                f"{listed(different)}. They are of different saves; get all files from one."
            )
        shapes = [name for name in held if held[name].info != stage[0][name].info]
        if shapes:
            name = shapes[0]
            raise FormatError(
                f"{where}: {name!r} is {_text(held[name].info)} on tensor-parallel rank {rank} of stage "
                f"{number}, but {_text(stage[0][name].info)} on rank 0. Get all files from one save."
            )


def _text(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"


def _blocks(rank: Rank, names: Names, number: int, where: str) -> int:
    """Return how many blocks a stage has. Raises FormatError where their numbers have gaps."""
    found = {int(index) for name in rank if (index := _block_of(name, names)) is not None}
    if found != set(range(len(found))):
        missing = sorted(set(range(max(found))) - found)
        raise FormatError(f"{where}: stage {number} lacks its blocks {missing}. Is the file complete?")
    return len(found)


def _block_of(name: str, names: Names) -> str | None:
    if not names.blocks or not name.startswith(names.blocks):
        return None
    index = name[len(names.blocks) :].partition(".")[0]
    return index if index.isdigit() else None


def _renumbered(name: str, names: Names, offset: int) -> str:
    index = _block_of(name, names)
    if index is None or offset == 0:
        return name
    rest = name[len(names.blocks) + len(index) :]
    return f"{names.blocks}{int(index) + offset}{rest}"


def stages_of(names: Names, foreign: Sequence[str], sizes: Sequence[int]) -> list[dict[str, str]]:
    """Return for each stage {name in the stage: name in the whole}; blocks are numbered from 0 in each.

    Raises FormatError where the sizes do not sum to the number of blocks.
    """
    found = {name: _block_of(name, names) for name in foreign}
    count = len({index for index in found.values() if index is not None})
    if sum(sizes) != count:
        raise FormatError(
            f"pp sizes {list(sizes)} sum to {sum(sizes)}, but the model has {count} layers. "
            f"Give {len(sizes)} sizes that sum to {count}."
        )
    bounds = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
    stages: list[dict[str, str]] = [{} for _ in sizes]
    for name, index in found.items():
        if index is None:
            number = -1 if name.startswith(tuple(names.last)) else 0
            stages[number][name] = name
            continue
        number = next(n for n in range(len(sizes)) if bounds[n] <= int(index) < bounds[n + 1])
        stages[number][_renumbered(name, names, -bounds[number])] = name
    return stages
