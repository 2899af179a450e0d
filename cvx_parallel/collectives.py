"""Collectives of torch under one name: older releases have them under another."""

import torch.distributed as dist
import torch.distributed._functional_collectives as functional

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""(output, input, group=): every rank's input, one after the other, in the output."""

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""(output, input, group=, async_op=): this rank's part of the sum, in the output."""

gathered = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
"""(x, dim, group) -> every rank's x along a dim, to be waited for; torch.compile sees through it."""

reduce_scattered = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor
"""(x, operation, dim, group) -> this rank's part of the sum, to be waited for."""
