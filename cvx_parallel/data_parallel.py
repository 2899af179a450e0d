"""Averaging gradients over ranks that read different rows, with or without sharing what they hold.

Every rank's loss is the mean over its own rows; gradients are averaged over the axes `loss`. Parameter names
never change.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from cvx_parallel.gradients import BUCKET, in_buckets, local


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


def register(module: nn.Module, method: str) -> None:
    """Gather a module's parameters for another method than forward too."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    register_fsdp_forward_method(module, method)


class Averaging:
    """Gradients averaged over a group after the last backward pass of a step, in buckets, while it runs.

    names: the parameters it is about; None: all of the module.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, names: Collection[str] | None = None):
        self._module, self._group, self._size = module, group, dist.get_world_size(group)
        self._names = names
        self._is_last = self._is_watching = False
        self._full: list[Tensor] = []
        self._bytes = 0
        self._pending: list[tuple[Any, Tensor, list[Tensor]]] = []
        self._queued = False

    def before(self, is_last: bool) -> None:
        """Say whether the next backward pass is the last one of a step."""
        self._is_last = is_last
        if not self._is_watching:  # not sooner: getting memory replaces a module's parameters
            self._is_watching = True
            for name, param in self._module.named_parameters():
                if param.requires_grad and (self._names is None or name in self._names):
                    param.register_post_accumulate_grad_hook(self._ready)

    def _ready(self, param: Tensor) -> None:
        if not self._is_last:
            return
        if not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        assert param.grad is not None
        self._full.append(local(param.grad))
        self._bytes += self._full[-1].nbytes
        if self._bytes >= BUCKET:
            self._send()

    def _send(self) -> None:
        for grads in in_buckets(self._full):
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            self._pending.append((dist.all_reduce(flat, group=self._group, async_op=True), flat, grads))
        self._full, self._bytes = [], 0

    def _finish(self) -> None:
        """Average what is left, and put all averages where the gradients were."""
        self._send()
        for work, flat, grads in self._pending:
            work.wait()
            flat /= self._size
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))
        self._pending, self._queued = [], False
