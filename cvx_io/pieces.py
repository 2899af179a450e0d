"""Tensors as runs of rows that follow each other: what is cut and joined along dim 0 is never copied for it.

A `load` of Tensors that is a ByPieces gives a tensor's pieces as well; of any other load, the tensor is the
only piece. So code that wraps a load need not know of pieces. Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from cvx_core.errors import FormatError
from cvx_core.interfaces import TensorInfo, Tensors

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4 << 20
"""Most bytes of a piece that has to be made, and so much of the memory that a conversion needs."""


@dataclass(frozen=True)
class ByPieces:
    """A `load` that makes tensors of pieces. make: gives the pieces of a name, made one by one."""

    index: Mapping[str, TensorInfo]
    make: Callable[[str], Iterable[Tensor]]

    def __call__(self, name: str) -> Tensor:
        """Return a tensor whole: its only piece, or a copy. Raises FormatError where it is another."""
        return joined(checked(name, self.make(name), self.index[name]), self.index[name])


def pieces(tensors: Tensors, name: str) -> Iterator[Tensor]:
    """Yield the pieces of a tensor, to be used one after the other."""
    load = tensors.load
    if isinstance(load, ByPieces):
        yield from load.make(name)
    else:
        yield load(name)


def checked(name: str, found: Iterable[Tensor], expected: TensorInfo) -> Iterator[Tensor]:
    """Yield the pieces of a tensor. Raises FormatError where they do not make up the one expected."""
    length, *row = expected.shape or (1,)
    held = 0
    for piece in found:
        held += len(piece) if piece.ndim else 1
        fits = piece.ndim == len(expected.shape) and list(piece.shape[1:]) == row and held <= length
        if not fits or describe(piece).dtype != expected.dtype:
            raise FormatError(_differs(name, str(describe(piece)), expected))
        yield piece
    if held < length:
        raise FormatError(_differs(name, f"{held} rows long", expected))


def describe(tensor: Tensor) -> TensorInfo:
    """Return a tensor's shape and dtype name."""
    return TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def joined(found: Iterable[Tensor], info: TensorInfo) -> Tensor:
    """Return one tensor of all pieces; a single piece is returned as it is."""
    import torch

    rest = iter(found)
    first = next(rest, None)
    if first is not None and tuple(first.shape) == info.shape:
        next(rest, None)  # so that pieces that are too many are found
        return first
    whole = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
    begin = 0
    for piece in chain([] if first is None else [first], rest):
        whole[begin : begin + len(piece)] = piece
        begin += len(piece)
    return whole


def rows(found: Iterable[Tensor], begin: int, end: int) -> Iterator[Tensor]:
    """Yield what pieces hold of the rows from `begin` to before `end`, as views."""
    start = 0
    for piece in found:
        first, last = max(begin - start, 0), min(end - start, len(piece))
        if first < last:
            yield piece[first:last]
        start += len(piece)
        if start >= end:
            return


def side_by_side(shards: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the rows of tensors joined along dim 1, some at a time, each time in memory of their own."""
    import torch

    row = sum(shard[:1].numel() * shard.element_size() for shard in shards)
    for block in zip(*(shard.split(max(1, BLOCK // max(row, 1))) for shard in shards), strict=True):
        yield torch.cat(block, dim=1)


def _differs(name: str, found: str, expected: TensorInfo) -> str:
    return f"{name!r} is {found}, but its source announced {expected}. Was it changed meanwhile?"
