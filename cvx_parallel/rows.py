"""Rows of a batch worked on by several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cvx_parallel.collectives import all_gather

Function = Callable[[Any], tuple[Tensor, Tensor]]


def over_rows(function: Function, group: dist.ProcessGroup) -> Function:
    """Return a function of B rows, a tensor or a sequence, that runs on equally many of them on each rank.

    function: returns two tensors with B rows. Where B does not divide, some ranks repeat the last row: all
    make the same calls, so that a model whose parameters are shared out does not wait for ever. All ranks
    give the same rows, and get the results of all. One all-gather for each tensor.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def shared(rows: Any) -> tuple[Tensor, Tensor]:
        count = len(rows)
        share = -(-count // size)
        mine = [min(rank * share + i, count - 1) for i in range(share)]
        first, second = function(_pick(rows, mine))
        return _gathered(first, count, size, group), _gathered(second, count, size, group)

    return shared


def _pick(rows: Any, places: Sequence[int]) -> Any:
    return rows[list(places)] if isinstance(rows, Tensor) else [rows[place] for place in places]


def _gathered(part: Tensor, count: int, size: int, group: dist.ProcessGroup) -> Tensor:
    """Return the first `count` of the rows that all ranks have parts of; booleans travel as bytes."""
    sent = (part.byte() if part.dtype == torch.bool else part).contiguous()
    every = sent.new_empty(size * len(sent), *sent.shape[1:])
    all_gather(every, sent, group=group)
    return every[:count].to(part.dtype)
