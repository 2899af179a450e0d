"""recompute and compile: other ways of running a block, in its `run` slot."""

from __future__ import annotations

from typing import Any

from cvx_core.errors import CvxError, did_you_mean
from cvx_core.interfaces import Parts
from cvx_parallel.recompute import backends, compiled, recomputed
from cvx_plugins.parallel.recompute_config import CompileConfig, RecomputeConfig


class Recompute:
    """Every n-th block of this rank keeps less, and computes it again."""

    def __init__(self, cfg: RecomputeConfig, _deps: Any):
        self.cfg = cfg

    def apply(self, parts: Parts) -> Parts:
        for block in parts.blocks[:: self.cfg.every]:
            block.run = recomputed(block.run, self.cfg.mode == "selective", self.cfg.offload)
        return parts


class Compile:
    """Every block is compiled, with whatever other strategies put into it."""

    def __init__(self, cfg: CompileConfig, _deps: Any):
        self.cfg = cfg

    def apply(self, parts: Parts) -> Parts:
        usual, known = backends()
        if self.cfg.backend not in known:
            raise CvxError(
                f"compile.backend: torch has no {self.cfg.backend!r}.{did_you_mean(self.cfg.backend, known)} "
                f"It has {', '.join(usual)}; to find faults, aot_eager and eager."
            )
        module = parts.trained if parts.trained is not None else parts.predictor
        blocks = list(module.blocks.values())
        for block in blocks:
            block.run = compiled(block.run, len(blocks), **self.cfg.model_dump())
        return parts
