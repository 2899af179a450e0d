"""Averaging gradients over ranks that read different rows, in buckets, while the backward pass runs.

Every rank's loss is the mean over its own rows; gradients are averaged over the axes `loss`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cvx_parallel.gradients import BUCKET, local


class Exchange(ABC):
    """Sees each gradient of the last backward pass of a step as soon as it is there.

    names: the parameters it is about; None: all of the module that are trained.
    """

    def __init__(self, module: nn.Module, names: Collection[str] | None = None):
        self._module, self._names = module, names
        self._is_last = self._queued = False
        self._params: list[Tensor] | None = None

    def before(self, is_last: bool) -> None:
        """Say whether the next backward pass is the last one of a step."""
        self._is_last = is_last
        self.params()

    def params(self) -> list[Tensor]:
        """Return the parameters. Not sooner than training: getting memory replaces a module's."""
        if self._params is None:
            self._params = [
                param
                for name, param in self._module.named_parameters()
                if param.requires_grad and (self._names is None or name in self._names)
            ]
            for param in self._params:
                param.register_post_accumulate_grad_hook(self._ready)
        return self._params

    @abstractmethod
    def take(self, param: Tensor) -> None:
        """Begin to exchange a parameter's gradient."""

    @abstractmethod
    def finish(self) -> None:
        """End all exchanges: from then on gradients are what they are to be."""

    def _ready(self, param: Tensor) -> None:
        if not self._is_last:
            return
        if not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self.take(param)

    def _finish(self) -> None:
        self.finish()
        self._queued = False


@dataclass
class Bucket:
    """Memory that gradients are laid into one after the other, to go through one collective."""

    flat: Tensor
    used: int = 0

    @property
    def held(self) -> Tensor:
        return self.flat[: self.used]

    def fits(self, gradient: Tensor) -> bool:
        return self.used + gradient.numel() <= self.flat.numel()

    def lay(self, gradient: Tensor) -> Tensor:
        """Copy a gradient in; return it there, in the layout it had."""
        strides = torch.empty_like(gradient, device="meta").stride()
        laid = self.flat.as_strided(gradient.shape, strides, self.used)
        self.used += gradient.numel()
        return laid.copy_(gradient)


class Averaging(Exchange):
    """Gradients averaged over a group.

    From then on they are views of the buckets, which are kept: there is one copy of them, and only the first
    step asks for memory.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, names: Collection[str] | None = None):
        super().__init__(module, names)
        self._group, self._size = group, dist.get_world_size(group)
        self._holds = False
        self._flats: dict[tuple[torch.dtype, int], Tensor] = {}
        self._open: dict[torch.dtype, Bucket] = {}
        self._pending: list[tuple[Any, Bucket]] = []

    def before(self, is_last: bool) -> None:
        """Say whether the next backward pass is the last one of a step."""
        super().before(is_last)
        if self._holds:
            self._holds = False
            for param in self.params():
                if param.grad is not None:  # of the step before, and wanted still: out of the way
                    param.grad = param.grad.clone()

    def take(self, param: Tensor) -> None:
        """Lay a gradient into a bucket."""
        assert param.grad is not None
        gradient = local(param.grad)
        bucket = self._open.get(gradient.dtype)
        if bucket is not None and not bucket.fits(gradient):
            self._send(gradient.dtype)
            bucket = None
        if bucket is None:
            bucket = self._open[gradient.dtype] = self._bucket(gradient)
        param.grad = _like(param.grad, bucket.lay(gradient))

    def finish(self) -> None:
        """Average what is left."""
        for dtype in list(self._open):
            self._send(dtype)
        for work, bucket in self._pending:
            work.wait()
            bucket.held.div_(self._size)
        self._pending, self._holds = [], True

    def _bucket(self, gradient: Tensor) -> Bucket:
        """Return the next bucket of a step, with room for a gradient."""
        key = (gradient.dtype, len(self._pending) + len(self._open))
        if key not in self._flats or not Bucket(self._flats[key]).fits(gradient):
            room = max(BUCKET // gradient.dtype.itemsize, gradient.numel())
            self._flats[key] = torch.empty(room, dtype=gradient.dtype, device=gradient.device)
        return Bucket(self._flats[key])

    def _send(self, dtype: torch.dtype) -> None:
        bucket = self._open.pop(dtype)
        self._pending.append((dist.all_reduce(bucket.held, group=self._group, async_op=True), bucket))


def _like(gradient: Tensor, held: Tensor) -> Tensor:
    """Return `held` as a gradient laid out as another is."""
    if not isinstance(gradient, DTensor):
        return held
    return DTensor.from_local(
        held,
        gradient.device_mesh,
        gradient.placements,
        run_check=False,
        shape=gradient.shape,
        stride=gradient.stride(),
    )
