"""Parameters shared out over ranks that read different rows, on torch's FSDP2. Names never change."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    policy: MixedPrecisionPolicy,
    prefetch: int = 1,
    ahead_in_backward: bool = True,
    methods: Sequence[str] = (),
    ignored: Collection[nn.Parameter] = (),
) -> Callable[[bool], None]:
    """Share parameters over a mesh of one dim, or (replicate, shard), block by block, the rest as one unit.

    prefetch: blocks that are gathered while one is computed; ahead_in_backward: in the backward pass too;
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
            reshard_after_forward=True,
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
    for unit in units if not ahead_in_backward else ():
        unit.set_modules_to_backward_prefetch([unit])  # it is there; without a list torch gathers the next

    def before(is_last: bool) -> None:
        root.set_requires_gradient_sync(is_last)
        root.set_is_last_backward(is_last)
        root.set_reshard_after_backward(True)  # the pipeline keeps parameters within a batch

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
