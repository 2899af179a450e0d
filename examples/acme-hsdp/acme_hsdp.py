"""HSDP: parameters are sharded inside groups of ranks, and the groups hold copies of one another.

The whole package: a torch-free manifest on top, and the strategy, on torch's own engine.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from cvx_core import Component, Problem, Spec, hookimpl
from cvx_core.config import Positive
from cvx_core.degrees import SEVERAL
from cvx_core.strategy import Stage, StrategyConfig


class HSDPConfig(StrategyConfig):
    """Sharded inside a machine, replicated between machines."""

    stage: ClassVar[Stage] = Stage.SHARD
    fields: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "shards": ("dp_shard",),
        "replicas": ("dp_replicate",),
    }

    shards: Annotated[int, Field(ge=2)] = 2
    """Ranks that share the parameters; they gather them among themselves only."""
    replicas: Positive | Literal["auto"] = "auto"
    """Such groups, which add up their gradients; auto takes what the other strategies leave."""

    def degrees(self) -> Mapping[str, int | None]:
        """Return the axes that it owns: {axis: ranks, None to take what is left}."""
        return {"dp_replicate": None if self.replicas == "auto" else self.replicas, "dp_shard": self.shards}

    def limits(self, spec: Spec) -> Mapping[str, Container[int]]:
        """Return what may be proposed where a mesh does not multiply out."""
        return {"dp_shard": SEVERAL}

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield why there is nothing to shard."""
        if spec.config("task").trains is None:
            yield Problem("", f"task {spec.name_of('task')!r} trains nothing. Remove this strategy.")


@hookimpl
def cvx_components() -> Iterable[Component]:
    """Yield the strategy."""
    yield Component(
        "strategy",
        "acme-hsdp",
        HSDPConfig,
        "acme_hsdp:HSDP",
        summary="parameters sharded in groups that are copies of one another",
    )


class HSDP:
    """Shards each block, and the rest as one unit."""

    def __init__(self, cfg: HSDPConfig, _deps: Any):
        self.cfg = cfg

    def apply(self, parts: Any) -> Any:
        """Return the parts with their trained module sharded; torch is imported here, as a run asked for it.

        "fsdp" is dp_shard joined with the axes along which others have cut a sequence: these ranks need the
        same parameters, so they share them too.
        """
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        axes = ("dp_replicate", "fsdp") if parts.mesh.size("dp_replicate") > 1 else ("fsdp",)
        mesh, module = parts.mesh.along(*axes), parts.trained
        for block in parts.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        for method in parts.methods:
            register_fsdp_forward_method(module, method)

        def before_update(is_last: bool) -> None:
            module.set_requires_gradient_sync(is_last)

        return replace(parts, before_update=before_update)
