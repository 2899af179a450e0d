"""The `run` slot of a block: computing it once more in the backward pass, and compiling it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from cvx_core.interfaces import Tokens

Body = Callable[[Tokens], Tokens]
Run = Callable[[Body, Tokens], Tokens]


def recomputed(run: Run, keep_attention: bool, offload: bool = False) -> Run:
    """Return a `run` that keeps a block's input only, and the outputs of attention kernels where asked to.

    offload: the input waits in host memory. Collectives inside are issued again in the backward pass, on all
    ranks in the same order.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if keep_attention:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def again(body: Body, tokens: Tokens) -> Tokens:
        streams, rest = (tokens.video, tokens.text), tokens._replace(video=None, text=None)  # type: ignore[arg-type]

        def whole(video: Tensor, text: Tensor) -> Tokens:
            return run(body, rest._replace(video=video, text=text))

        kept: AbstractContextManager[Any] = saved_tensors_hooks(_to_host, _back) if offload else nullcontext()
        with kept:
            result: Tokens = checkpoint(whole, *streams, **options)
        return result

    return again


Away = tuple[torch.device, torch.Size, torch.dtype, Tensor | None]
"""What a tensor was, and its values; none on meta."""


def _to_host(tensor: Tensor) -> Away:
    host = None
    if tensor.device.type == "cpu":
        host = tensor
    elif not tensor.is_meta:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        host.copy_(tensor)
    return tensor.device, tensor.shape, tensor.dtype, host


def _back(away: Away) -> Tensor:
    device, shape, dtype, host = away
    return host.to(device) if host is not None else torch.empty(shape, dtype=dtype, device=device)


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Keep what fused kernels return, on any device; attention made of plain products is computed again."""
    return CheckpointPolicy.MUST_SAVE if "attention" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE


def backends() -> tuple[list[str], list[str]]:
    """Return the names of torch.compile's backends here: the usual ones, and all, for finding faults too."""
    every: tuple[str, ...] = ()  # tags of backends to leave out
    return torch.compiler.list_backends(), torch.compiler.list_backends(exclude_tags=every)


def compiled(run: Run, blocks: int, **options: Any) -> Run:
    """Return a `run` for one block that compiles what `run` makes of its body; blocks that agree share code.

    blocks: how many there are; where strategies make them differ, each may need code of its own. options:
    those of torch.compile.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options = {"recompile_limit": 8 + 2 * blocks, **options}
    made: list[Body] = []

    def once(body: Body, tokens: Tokens) -> Tokens:
        if not made:
            made.append(torch.compile(partial(run, body), **options))
        return made[0](tokens)

    return once
