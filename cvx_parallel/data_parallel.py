"""Averaging gradients over ranks that read different rows, with or without sharing what they hold.

Every rank's loss is the mean over its own rows; gradients are averaged over the axes `loss`. Parameter names
never change.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cvx_parallel.gradients import BUCKET, local


def shard(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    reshard_after_forward: bool,
    policy: MixedPrecisionPolicy,
    prefetch: int = 1,
    methods: Sequence[str] = (),
    ignored: Collection[nn.Parameter] = (),
) -> Callable[[bool], None]:
    """Share parameters over a mesh of one dim, or (replicate, shard), block by block, the rest as one unit.

    methods: those of the module, besides forward, that use parameters of its own; ignored: parameters that
    stay whole, and whose gradients stay this rank's own. Returns what has to be called before each batch of a
    step, with whether it is the last: gradients are exchanged then only.
    """
    # A block passes on what it does not change, such as the time embedding, and FSDP takes that for a view.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    units: list[Any] = [
        fully_shard(
            unit,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=policy,
            ignored_params=set(ignored) or None,
        )
        for unit in (*blocks, module)
    ]
    *blocks, root = units
    for method in methods:
        register(root, method)
    for number, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(list(blocks[number + 1 : number + 1 + prefetch]))
        block.set_modules_to_backward_prefetch(list(blocks[max(number - prefetch, 0) : number][::-1]))

    def before(is_last: bool) -> None:
        root.set_requires_gradient_sync(is_last)
        root.set_is_last_backward(is_last)
        root.set_reshard_after_backward(is_last or reshard_after_forward)

    return before


def reshard(module: nn.Module) -> None:
    """Give up what a module's parts have gathered, which a pass without gradients leaves in place."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def register(module: nn.Module, method: str) -> None:
    """Gather a module's parameters for another method than forward too."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    register_fsdp_forward_method(module, method)


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


class Averaging:
    """Gradients averaged over a group after the last backward pass of a step, in buckets, while it runs.

    From then on gradients are views of the buckets, which are kept: there is one copy of them, and only the
    first step asks for memory. names: the parameters it is about; None: all of the module.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, names: Collection[str] | None = None):
        self._module, self._group, self._size = module, group, dist.get_world_size(group)
        self._names = names
        self._params: list[Tensor] | None = None
        self._is_last = self._queued = self._holds = False
        self._flats: dict[tuple[torch.dtype, int], Tensor] = {}
        self._open: dict[torch.dtype, Bucket] = {}
        self._pending: list[tuple[Any, Bucket]] = []

    def before(self, is_last: bool) -> None:
        """Say whether the next backward pass is the last one of a step."""
        self._is_last = is_last
        if self._params is None:  # not sooner: getting memory replaces a module's parameters
            self._params = [
                param
                for name, param in self._module.named_parameters()
                if param.requires_grad and (self._names is None or name in self._names)
            ]
            for param in self._params:
                param.register_post_accumulate_grad_hook(self._ready)
        if self._holds:
            self._holds = False
            for param in self._params:
                if param.grad is not None:  # of the step before, and wanted still: out of the way
                    param.grad = param.grad.clone()

    def _ready(self, param: Tensor) -> None:
        if not self._is_last:
            return
        if not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        assert param.grad is not None
        gradient = local(param.grad)
        bucket = self._open.get(gradient.dtype)
        if bucket is not None and not bucket.fits(gradient):
            self._send(gradient.dtype)
            bucket = None
        if bucket is None:
            bucket = self._open[gradient.dtype] = self._bucket(gradient)
        param.grad = _like(param.grad, bucket.lay(gradient))

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

    def _finish(self) -> None:
        """Average what is left."""
        for dtype in list(self._open):
            self._send(dtype)
        for work, bucket in self._pending:
            work.wait()
            bucket.held.div_(self._size)
        self._pending, self._queued, self._holds = [], False, True


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
