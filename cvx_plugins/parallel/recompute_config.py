"""Configs of recompute and compile: how a block is run. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from cvx_core import Component
from cvx_core.config import Positive
from cvx_core.degrees import Degrees
from cvx_core.errors import Problem
from cvx_core.strategy import Stage, StrategyConfig
from cvx_plugins.parallel.pp_config import PipelineConfig

if TYPE_CHECKING:
    from cvx_core.spec import Spec


class RecomputeConfig(StrategyConfig):
    """Keep fewer activations for the backward pass, and compute them again there."""

    stage: ClassVar[Stage] = Stage.RUN

    every: Positive = 1
    """Recompute one block in so many, the first being one of them; 1 recomputes all."""
    mode: Literal["full", "selective"] = "full"
    """full keeps what enters a block only; selective also what attention returns, its costliest part."""
    offload: bool = False
    """Keep what enters a recomputed block in host memory until then; takes two copies of it per block."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield why there is nothing to recompute."""
        task = spec.config("task")
        if task is not None and task.trains is None:
            yield Problem("", f"task {spec.name_of('task')!r} has no backward pass. Remove it.")
        elif task is not None:
            yield from _needs_blocks(spec, task.trains)

    def notes(self, spec: Spec, mesh: Degrees | None) -> Iterable[str]:
        """Yield that of several blocks one is recomputed only."""
        layers = getattr(spec.config(spec.config("task").trains), "num_layers", 0)
        stages = (c.config for c in spec.parallel if isinstance(c.config, PipelineConfig))
        blocks = max((pipeline.most(layers) for pipeline in stages), default=layers)
        if 1 < blocks <= self.every:
            yield f"recompute: every {self.every} recomputes one block of the {blocks} that a rank has"


class CompileConfig(StrategyConfig):
    """Compile each block with torch.compile."""

    stage: ClassVar[Stage] = Stage.COMPILE

    backend: str = "inductor"
    """What generates the code; aot_eager generates none and is for finding faults."""
    fullgraph: bool = False
    """Refuse blocks that compile in several pieces only, instead of running them so."""
    dynamic: bool | None = None
    """Code for any shape (true), for each shape (false), or for any after a second shape came up (null)."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield why there is nothing to compile."""
        task = spec.config("task")
        yield from _needs_blocks(spec, (task.trains if task is not None else None) or "predictor")


def _needs_blocks(spec: Spec, section: str) -> Iterable[Problem]:
    if section in spec.choices and getattr(spec.config(section), "plan", None) is None:
        yield Problem("", f"{section} {spec.name_of(section)!r} has no list of blocks. Remove it.")


def components() -> Iterable[Component]:
    """Yield the strategies."""
    target = "cvx_plugins.parallel.recompute:"
    yield Component(
        "strategy",
        "recompute",
        RecomputeConfig,
        f"{target}Recompute",
        summary="activations computed again in the backward pass",
    )
    yield Component(
        "strategy", "compile", CompileConfig, f"{target}Compile", summary="blocks through torch.compile"
    )
