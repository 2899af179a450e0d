"""Gradients that lie on different meshes: the parts held here, their norm, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from cvx_core.mesh import Mesh

BUCKET = 25_000_000
"""Bytes of gradients that go through one collective."""


def local(gradient: Tensor) -> Tensor:
    """Return the part of a gradient that this rank holds; changing it changes the gradient."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def in_buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield plain gradients in lists of one dtype and at least BUCKET bytes, but for the last of each."""
    waiting: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        bucket = waiting.setdefault(gradient.dtype, [])
        bucket.append(gradient)
        if sum(part.nbytes for part in bucket) >= BUCKET:
            yield waiting.pop(gradient.dtype)
    yield from waiting.values()


def clip(params: Sequence[Tensor], most: float | None, mesh: Mesh) -> Tensor:
    """Scale all gradients so that their norm over the whole model is at most `most`; return it before.

    Plain gradients must be the same on all ranks but those of other pipeline stages. Collective over the
    world.
    """
    norm = total_norm(params, mesh)
    if most is not None:
        shrink(params, most, norm)
    return norm


def shrink(params: Sequence[Tensor], most: float, norm: Tensor) -> None:
    """Scale all gradients, whose norm over the whole model is `norm`, so that it is at most `most`."""
    if bool(most / (norm + 1e-6) >= 1):  # what gradients would be multiplied by, clamped to 1
        return
    with torch.no_grad():
        parts: list[Any] = [_Held(local(param.grad)) for param in params if param.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(parts, most, norm)


class _Held(NamedTuple):
    """What a rank holds of a gradient, as torch's clipping asks for it.

    Of many shared-out gradients torch would first ask, for each of them, how all of them are shared out.
    """

    grad: Tensor


def total_norm(params: Sequence[Tensor], mesh: Mesh) -> Tensor:
    """Return the norm of all gradients of the model, at least in float32. params: some, on every rank.

    Each rank adds up what it holds, divided by how many ranks hold the same, so that one all-reduce over the
    world does, whatever meshes the gradients lie on.
    """
    wide = reduce(torch.promote_types, {param.dtype for param in params}, torch.float32)
    squares = torch.zeros((), dtype=wide, device=params[0].device)
    for copies, group in _by_copies(params, mesh).items():
        norm = torch.nn.utils.get_total_norm(group)
        squares = squares + norm.to(wide) ** 2 / copies
    if mesh.degrees.world > 1:
        dist.all_reduce(squares)
    return squares.sqrt()


def _by_copies(params: Sequence[Tensor], mesh: Mesh) -> dict[int, list[Tensor]]:
    """Group what this rank holds of the gradients by how many ranks hold the same."""
    groups: dict[int, list[Tensor]] = {}
    world, stages = mesh.degrees.world, mesh.size("pp")
    for param in params:
        if (grad := param.grad) is not None:
            copies = world // (stages * (_pieces(grad) if isinstance(grad, DTensor) else 1))
            groups.setdefault(copies, []).append(local(grad))
    return groups


def _pieces(gradient: DTensor) -> int:
    """Return how many pieces a gradient is shared out in."""
    dims = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
    return math.prod(size for size, placement in dims if not placement.is_replicate())
