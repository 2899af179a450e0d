"""ddp, zero2 and zero3: ranks that read different rows, and share more and more of what they hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from cvx_core.interfaces import Parts
from cvx_parallel.averaging import Averaging
from cvx_parallel.data_parallel import shard
from cvx_parallel.scattering import Scattering
from cvx_parallel.sliced import sliced
from cvx_plugins.parallel import DataConfig, Zero2Config, Zero3Config


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


class Zero2:
    """Every rank holds parameters; of gradients it keeps some rows of each, and updates those."""

    def __init__(self, cfg: Zero2Config):
        self.cfg = cfg

    def apply(self, parts: Parts) -> Parts:
        if parts.mesh.size("loss") == 1:
            return parts
        scattering = Scattering(parts.trained, parts.mesh, dtype_of(self.cfg.reduce_dtype))
        assert parts.make_optimizer is not None
        make = sliced(parts.make_optimizer, parts.mesh)
        return replace(parts, before_update=scattering.before, make_optimizer=make)


class Zero3:
    """Parameters, gradients and optimizer state in shards."""

    def __init__(self, cfg: Zero3Config):
        self.cfg = cfg

    def apply(self, parts: Parts) -> Parts:
        if parts.mesh.size("fsdp") == 1:
            return parts
        module = parts.trained if parts.trained is not None else parts.predictor
        before = shard(
            module,
            list(getattr(module, "blocks", {}).values()),
            parts.mesh.along("fsdp"),
            policy=MixedPrecisionPolicy(reduce_dtype=dtype_of(self.cfg.reduce_dtype)),
            prefetch=self.cfg.prefetch,
            methods=parts.methods,
        )
        return replace(parts, before_update=before)


def ddp(cfg: DataConfig, _deps: Any) -> DDP:
    """Build the strategy."""
    return DDP(cfg)


def zero2(cfg: Zero2Config, _deps: Any) -> Zero2:
    """Build the strategy."""
    return Zero2(cfg)


def zero3(cfg: Zero3Config, _deps: Any) -> Zero3:
    """Build the strategy."""
    return Zero3(cfg)


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return torch's dtype of that name, None for none."""
    return getattr(torch, name) if name is not None else None
