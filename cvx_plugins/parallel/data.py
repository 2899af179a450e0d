"""ddp, zero2 and zero3: the data axis, on torch's own engines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from cvx_core.interfaces import Parts
from cvx_parallel.data_parallel import Averaging, shard
from cvx_plugins.parallel import DataConfig, ShardConfig


class DDP:
    """Every rank holds everything; gradients are averaged."""

    def __init__(self, cfg: DataConfig):
        self.cfg = cfg

    def apply(self, parts: Parts) -> Parts:
        group = parts.mesh.group("loss")
        module = parts.trained
        if group is None or module is None:
            return parts
        averaging = Averaging(module, group)
        return replace(parts, before_update=averaging.before)


class Zero:
    """Parameters, gradients and optimizer state in shards; zero2 keeps parameters whole between passes."""

    def __init__(self, cfg: ShardConfig, reshard: bool):
        self.cfg, self.reshard = cfg, reshard

    def apply(self, parts: Parts) -> Parts:
        if parts.mesh.size("fsdp") == 1:
            return parts
        reduce = getattr(torch, self.cfg.reduce_dtype) if self.cfg.reduce_dtype else None
        module = parts.trained if parts.trained is not None else parts.predictor
        before = shard(
            module,
            list(getattr(module, "blocks", {}).values()),
            parts.mesh.along("fsdp"),
            reshard_after_forward=self.reshard,
            policy=MixedPrecisionPolicy(reduce_dtype=reduce),
            prefetch=self.cfg.prefetch,
            methods=parts.methods,
        )
        return replace(parts, before_update=before)


def ddp(cfg: DataConfig, _deps: Any) -> DDP:
    """Build the strategy."""
    return DDP(cfg)


def zero2(cfg: ShardConfig, _deps: Any) -> Zero:
    """Build the strategy."""
    return Zero(cfg, reshard=False)


def zero3(cfg: ShardConfig, _deps: Any) -> Zero:
    """Build the strategy."""
    return Zero(cfg, reshard=True)
