"""Gradients averaged over ranks that keep some rows each, in buckets, while the backward pass runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cvx_core.mesh import Mesh
from cvx_parallel.averaging import Exchange
from cvx_parallel.collectives import reduce_scatter
from cvx_parallel.gradients import BUCKET, local
from cvx_parallel.layouts import Layouts


@dataclass(frozen=True)
class Sent:
    """A bucket on its way. widths: values of each parameter that a rank has at most; mine: what this gets."""

    params: list[Tensor]
    widths: list[int]
    mine: Tensor
    flat: Tensor
    work: Any


class Scattering(Exchange):
    """Gradients averaged over the axes `loss`, of which this rank keeps its rows, as parts of a DTensor.

    Rows are shared out as torch.chunk does. What is sent has as many rows for each rank, some of no meaning.
    """

    def __init__(self, module: nn.Module, mesh: Mesh, dtype: torch.dtype | None = None):
        """dtype: in which gradients are added up; None: their own."""
        super().__init__(module)
        group = mesh.group("loss")
        assert group is not None
        self._group, self._size, self._place = group, mesh.size("loss"), mesh.place("loss")
        self._dtype, self._layouts = dtype, Layouts(mesh)
        self._open: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        self._pending: list[Sent] = []
        self._spare: list[Tensor] = []

    def take(self, param: Tensor) -> None:
        """Put a gradient into a bucket; from then on the parameter has none."""
        assert param.grad is not None
        gradient = local(param.grad)
        param.grad = None
        bucket = self._open.setdefault(gradient.dtype, [])
        bucket.append((param, gradient))
        if sum(part.nbytes for _, part in bucket) >= BUCKET:
            self._send(gradient.dtype)

    def finish(self) -> None:
        """Average what is left."""
        for dtype in list(self._open):
            self._send(dtype)
        while self._pending:
            self._receive()

    def _send(self, dtype: torch.dtype) -> None:
        bucket = self._open.pop(dtype)
        while len(self._pending) > 1:  # there is memory for two at a time
            self._receive()
        widths = [self._rows(gradient) * math.prod(gradient.shape[1:]) for _, gradient in bucket]
        flat = self._flat(sum(widths), self._dtype or dtype, bucket[0][1].device)
        lanes = flat.view(self._size, -1).split(widths, dim=1)
        for (_, gradient), lane in zip(bucket, lanes, strict=True):
            self._lay(gradient, lane)
        mine = torch.empty(sum(widths), dtype=flat.dtype, device=flat.device)
        work = reduce_scatter(mine, flat, group=self._group, async_op=True)
        self._pending.append(Sent([param for param, _ in bucket], widths, mine, flat, work))

    def _lay(self, gradient: Tensor, lane: Tensor) -> None:
        """Copy a gradient's rows into the places of the ranks that keep them."""
        step = self._rows(gradient)
        if len(gradient) == step * self._size:
            lane.copy_(gradient.reshape(self._size, -1))
            return
        for place, rows in enumerate(gradient.split(step)):
            lane[place, : rows.numel()].copy_(rows.reshape(-1))

    def _receive(self) -> None:
        """Wait for the bucket sent first, and give its parameters their rows."""
        sent = self._pending.pop(0)
        sent.work.wait()
        self._spare.append(sent.flat)
        parts = sent.mine.div_(self._size).split(sent.widths)
        for param, part in zip(sent.params, parts, strict=True):
            held = local(param)
            count = min(max(len(held) - self._place * self._rows(held), 0), self._rows(held))
            rows = part[: count * math.prod(held.shape[1:])].view(count, *held.shape[1:]).to(param.dtype)
            param.grad = self._layouts.part(param, "loss", rows)

    def _rows(self, held: Tensor) -> int:
        """Return the rows of a rank that has the most."""
        return -(-len(held) // self._size)

    def _flat(self, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for a bucket: that of an earlier one where it fits."""
        size = width * self._size
        for number, spare in enumerate(self._spare):
            if spare.dtype == dtype and spare.numel() == size:
                return self._spare.pop(number)
        self._spare = self._spare[-1:]
        return torch.empty(size, dtype=dtype, device=device)
