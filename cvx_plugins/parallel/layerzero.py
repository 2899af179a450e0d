"""zero1 and layerzero: the optimizer works on this rank's rows of what other ranks hold too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from cvx_core.interfaces import Parts
from cvx_parallel.averaging import Averaging
from cvx_parallel.data_parallel import shard
from cvx_parallel.sliced import sliced
from cvx_plugins.parallel.data import dtype_of
from cvx_plugins.parallel.layerzero_config import LayerZeroConfig, Zero1Config


class Zero1:
    """Every rank holds parameters and gradients; each updates its rows of every parameter."""

    def __init__(self, cfg: Zero1Config, _deps: Any):
        self.cfg = cfg

    def apply(self, parts: Parts) -> Parts:
        group = parts.mesh.group("loss")
        if group is None:
            return parts
        averaging = Averaging(parts.trained, group)
        assert parts.make_optimizer is not None
        make = sliced(parts.make_optimizer, parts.mesh)
        return replace(parts, before_update=averaging.before, make_optimizer=make)


class LayerZero:
    """Blocks are gathered inside a group; groups add up gradients, and each rank updates its own rows."""

    def __init__(self, cfg: LayerZeroConfig, _deps: Any):
        self.cfg = cfg

    def apply(self, parts: Parts) -> Parts:
        mesh = parts.mesh
        group = mesh.group("loss")
        if group is None:
            return parts
        ignored = parameters_of(parts.trained, self.cfg.ignored_modules)
        inside = mesh.along("fsdp")
        before = shard(
            parts.trained,
            parts.blocks,
            mesh.along("dp_replicate", "fsdp") if mesh.size("dp_replicate") > 1 else inside,
            policy=MixedPrecisionPolicy(
                dtype_of(self.cfg.param_dtype), dtype_of(self.cfg.reduce_dtype), cast_forward_inputs=False
            ),
            prefetch=int(self.cfg.forward_prefetch),
            ahead_in_backward=self.cfg.backward_prefetch == "BACKWARD_PRE",
            methods=parts.methods,
            ignored=ignored.values(),
        )
        averaging = Averaging(parts.trained, group, ignored)

        def before_update(is_last: bool) -> None:
            before(is_last)
            averaging.before(is_last)

        assert parts.make_optimizer is not None
        make = sliced(parts.make_optimizer, mesh)
        return replace(parts, before_update=before_update, make_optimizer=make)


def parameters_of(module: nn.Module, names: Sequence[str]) -> Mapping[str, nn.Parameter]:
    """Return {name: parameter} of those modules given by name that this rank has."""
    prefixes = tuple(f"{name}." for name in names)
    return {name: param for name, param in module.named_parameters() if name.startswith(prefixes)}
