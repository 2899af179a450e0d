"""Gradients that lie on different meshes: the parts held here, their norm, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

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
    meshes of the parameters and over `pp`.
    """
    groups = _by_mesh(params)
    norm = total_norm(groups, mesh)
    if most is not None:
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, most, norm)
    return norm


def total_norm(groups: Sequence[Sequence[Tensor]], mesh: Mesh) -> Tensor:
    """Return the norm of all gradients of the model; parameters are grouped by their mesh."""
    squares: Tensor | None = None
    for group in groups:
        norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        squares = whole.float() ** 2 if squares is None else squares + whole.float() ** 2
    if squares is None:
        squares = torch.zeros(())
    if (pipeline := mesh.group("pp")) is not None:
        dist.all_reduce(squares, group=pipeline)
    return squares.sqrt()


def _by_mesh(params: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group parameters that have gradients; norms of one call must lie on one mesh."""
    groups: dict[Any, list[Tensor]] = {}
    for param in params:
        if param.grad is not None:
            groups.setdefault(getattr(param.grad, "device_mesh", None), []).append(param)
    return list(groups.values())
