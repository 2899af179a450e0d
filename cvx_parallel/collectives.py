"""Collectives of torch under one name (older releases have others), and groups of which no other is there.

`FirstOf` stands for a process group where only memory matters: what is made has its shape and no values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""(output, input, group=): every rank's input, one after the other, in the output."""

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""(output, input, group=, async_op=): this rank's part of the sum, in the output."""

# torch.compile sees through these two; what they return is to be waited for.
_gathered = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_reduce_scattered = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor


@dataclass(frozen=True)
class FirstOf:
    """The first of `size` ranks, of which nobody else is there.

    copies: gathering and scattering take a copy of what a rank gives, as they do with gloo.
    """

    size: int
    copies: bool = False

    def made(self, given: Tensor, rows: int) -> Tensor:
        """Return what becomes of a tensor (n,...): (rows,...)."""
        out = given.new_empty(rows, *given.shape[1:])
        if self.copies:
            given.new_empty(given.shape)
        return out


Group: TypeAlias = "dist.ProcessGroup | FirstOf"


def rank_in(group: Group) -> int:
    """Return this process's place in a group."""
    return 0 if isinstance(group, FirstOf) else dist.get_rank(group)


def size_of(group: Group) -> int:
    """Return how many ranks a group has."""
    return group.size if isinstance(group, FirstOf) else dist.get_world_size(group)


def summed(x: Tensor, group: Group) -> Tensor:
    """Return the sum of all ranks' x."""
    if isinstance(group, FirstOf):
        return x.new_empty(x.shape)
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))


def gathered(x: Tensor, group: Group) -> Tensor:
    """Return every rank's x (n,...), which is contiguous, as (ranks * n,...)."""
    if isinstance(group, FirstOf):
        return group.made(x, group.size * len(x))
    return functional.wait_tensor(_gathered(x, 0, group))


def scattered_sum(x: Tensor, group: Group) -> Tensor:
    """Return this rank's part (n,...) of the sum of all ranks' x (ranks * n,...)."""
    if isinstance(group, FirstOf):
        return group.made(x, len(x) // group.size)
    return functional.wait_tensor(_reduce_scattered(x, "sum", 0, group))


def exchanged(x: Tensor, received: Sequence[int], sent: Sequence[int], group: Group) -> Tensor:
    """Return what comes from every rank, one after the other: rows of x go to each; sizes of both by rank."""
    if isinstance(group, FirstOf):
        return x.new_empty(sum(received), *x.shape[1:])
    return functional.wait_tensor(functional.all_to_all_single(x, list(received), list(sent), group))
