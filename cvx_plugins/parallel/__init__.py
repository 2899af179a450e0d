"""Strategies: who holds what, and who computes what. The mechanisms are in cvx_parallel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

from cvx_core import Component, Problem, Spec, hookimpl
from cvx_core.config import Positive
from cvx_core.strategy import Stage, StrategyConfig
from cvx_plugins.parallel import (
    cfg_parallel_config,
    cp_config,
    encoder_dp_config,
    interleave_config,
    layerzero_config,
    pp_config,
    recompute_config,
    tp_config,
    vae_cp_config,
)

Auto = Literal["auto"]


class DataConfig(StrategyConfig):
    """Data parallel: ranks read different rows. Gradients are averaged over them."""

    stage: ClassVar[Stage] = Stage.SHARD
    fields: ClassVar[Mapping[str, tuple[str, ...]]] = {"size": ("dp_replicate",)}

    size: Positive | Auto = "auto"
    """Ranks that read different rows; auto takes what the other strategies leave."""

    def degrees(self) -> Mapping[str, int | None]:
        return {"dp_shard": 1, "dp_replicate": None if self.size == "auto" else self.size}


class Zero2Config(DataConfig):
    """Data parallel with gradients and optimizer state shared out among the ranks (ZeRO)."""

    reduce_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision in which gradients are summed; null: that of the parameters."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield why there are no gradients."""
        yield from layerzero_config.needs_training(spec, "gradients")


class Zero3Config(DataConfig):
    """Data parallel with parameters, gradients and optimizer state shared out among the ranks (ZeRO)."""

    fields: ClassVar[Mapping[str, tuple[str, ...]]] = {"size": ("dp_shard",)}
    also_called: ClassVar[Mapping[str, str]] = {"fsdp": "`{use: zero3}`", "fsdp2": "`{use: zero3}`"}

    reduce_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision in which gradients are summed; null: that of the parameters."""
    prefetch: Positive = 1
    """Blocks whose parameters are gathered ahead."""

    def degrees(self) -> Mapping[str, int | None]:
        return {"dp_replicate": 1, "dp_shard": None if self.size == "auto" else self.size}


@hookimpl
def cvx_components() -> Iterable[Component]:
    target = "cvx_plugins.parallel.data:"
    yield Component(
        "strategy", "ddp", DataConfig, f"{target}ddp", summary="data parallel, everything replicated"
    )
    yield Component(
        "strategy", "zero2", Zero2Config, f"{target}zero2", summary="gradients and optimizer state sharded"
    )
    yield Component("strategy", "zero3", Zero3Config, f"{target}zero3", summary="parameters sharded too")
    yield from cp_config.components()
    yield from tp_config.components()
    yield from pp_config.components()
    yield from layerzero_config.components()
    yield from encoder_dp_config.components()
    yield from interleave_config.components()
    yield from vae_cp_config.components()
    yield from recompute_config.components()
    yield from cfg_parallel_config.components()
