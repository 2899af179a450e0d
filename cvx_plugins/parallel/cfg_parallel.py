"""cfg-parallel: fills `guided` of Parts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cvx_core.errors import CvxError
from cvx_core.interfaces import Condition, Deps, Parts
from cvx_parallel.collectives import all_gather
from cvx_plugins.parallel.cfg_parallel_config import CFGParallelConfig


class CFGParallel:
    """Each of two ranks predicts one half; one all-gather a step gives both halves to both."""

    def __init__(self, config: CFGParallelConfig, deps: Deps):
        pass

    def apply(self, parts: Parts) -> Parts:
        """Replace `guided`. Raises CvxError where the task has none."""
        group, place, predictor = parts.mesh.group("cfg"), parts.mesh.place("cfg"), parts.predictor
        if parts.guided is None:
            raise CvxError("cfg-parallel: the task does not sample with guidance. Remove this strategy.")
        if group is None:
            return parts

        def guided(
            latent: Tensor, timestep: Tensor, uncond: Condition, cond: Condition
        ) -> tuple[Tensor, Tensor]:
            mine = predictor(latent, timestep, (uncond, cond)[place]).contiguous()
            halves = torch.empty(2, *mine.shape, dtype=mine.dtype, device=mine.device)
            all_gather(halves.view(-1), mine.view(-1), group=group)
            return halves[0], halves[1]

        return replace(parts, guided=guided)
