"""The `run` slot of a block: computing it once more in the backward pass, and compiling it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from cvx_core.interfaces import Tokens

Body = Callable[[Tokens], Tokens]
Run = Callable[[Body, Tokens], Tokens]


def recomputed(run: Run, keep_attention: bool) -> Run:
    """Return a `run` that keeps a block's input only, and the outputs of attention kernels where asked to.

    Collectives inside are issued again in the backward pass, on all ranks in the same order.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if keep_attention:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def again(body: Body, tokens: Tokens) -> Tokens:
        result: Tokens = checkpoint(partial(run, body), tokens, **options)
        return result

    return again


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Keep what fused kernels return, on any device; attention made of plain products is computed again."""
    return CheckpointPolicy.MUST_SAVE if "attention" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE


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
