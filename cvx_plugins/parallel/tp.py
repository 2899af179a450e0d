"""tp: the predictor's column and row layers shared out, as its plan names them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cvx_core.interfaces import Deps, Parts, Plan
from cvx_parallel.tensor import (
    Exchange,
    Replicated,
    Shared,
    Whole,
    enter_once,
    is_inside,
    make_column,
    make_row,
    matching,
    share_sequence,
)
from cvx_plugins.parallel.tp_config import TensorConfig


class TensorParallel:
    """Every rank has some heads and hidden units, and with `sequence` some of the video's tokens."""

    def __init__(self, cfg: TensorConfig, plan: Plan):
        self.cfg, self.plan = cfg, plan

    def apply(self, parts: Parts) -> Parts:
        group = parts.mesh.group("tp")
        if group is None:
            return parts
        module = parts.predictor
        exchange: Replicated | Shared = Shared(group) if self.cfg.sequence else Replicated(group)
        sharded = self._share_out(module, parts.mesh.along("tp"), exchange)
        if isinstance(exchange, Shared):
            share_sequence(module, exchange)
        if parts.trains != "predictor":
            return parts
        whole = self._whole(module, group, sharded)

        def after_backward() -> None:
            parts.after_backward()
            whole()

        return replace(parts, after_backward=after_backward)

    def _share_out(self, module: Any, mesh: Any, exchange: Exchange) -> set[str]:
        """Turn layers into column and row layers; return the names of the parameters that are shared out."""
        around = matching(module, self.plan.attend)
        for attention in around.values():
            enter_once(attention, exchange)
        sharded = set()
        for name, layer in matching(module, self.plan.column).items():
            inside = is_inside(name, around)
            make_column(layer, mesh, None if inside else exchange, self.plan.num_heads if inside else None)
            sharded |= {f"{name}.weight", f"{name}.bias", f"{name}.lora_B.weight"}
        for name, layer in matching(module, self.plan.row).items():
            make_row(layer, mesh, exchange, self.plan.num_heads if is_inside(name, around) else None)
            sharded |= {f"{name}.weight", f"{name}.lora_A.weight"}
        return sharded

    def _whole(self, module: Any, group: Any, sharded: set[str]) -> Whole:
        names = {name for name, _ in module.named_parameters()}
        if self.cfg.sequence:
            return Whole(module, group, names - sharded, scaled=names, scale=1 / self.cfg.size)
        # Norms of queries and keys see the heads of this rank only, and so do the factors of LoRA that are
        # whole beside what is shared out. All else sees what every rank sees.
        around = matching(module, self.plan.attend)
        rows, columns = matching(module, self.plan.row), matching(module, self.plan.column)
        partial = {name for name in names - sharded if is_inside(name, around) and not is_inside(name, rows)}
        partial |= {f"{name}.lora_A.weight" for name in columns} | {f"{name}.lora_B.weight" for name in rows}
        return Whole(module, group, partial & names)


def build(cfg: TensorConfig, deps: Deps) -> TensorParallel:
    """Build the strategy."""
    assert deps.spec is not None
    return TensorParallel(cfg, deps.spec.config("predictor").plan())
