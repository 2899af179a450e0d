"""AdamW: torch's own where state and weights are plain, else step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cvx_core.interfaces import ParamGroup
from cvx_parallel.gradients import local
from cvx_plugins.optimizers.adam import FUSED_DEVICES, Adam, Adam8bit
from cvx_plugins.optimizers.adamw_config import AdamW8bitConfig, AdamWConfig
from cvx_plugins.optimizers.splitting import split
from cvx_plugins.optimizers.stepper import Maker

OPTIONS = ("lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True)
class AdamW:
    """Makes torch's AdamW."""

    cfg: AdamWConfig

    def build(self, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
        """Return the optimizer of the given parameters; a group's options override the config's.

        Raises PluginError for an unknown option, CvxError where there is nothing to optimise.
        """
        cfg = self.cfg
        parts = split(groups, cfg.decay_norms, OPTIONS)
        fused = self._fused({p.device.type for part in parts for p in part["params"]})
        return _OfParts(
            parts, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay, fused=fused
        )

    def _fused(self, devices: set[str]) -> bool | None:
        """Return torch's argument: True, or None for its default."""
        wanted = devices <= FUSED_DEVICES if self.cfg.fused == "auto" else self.cfg.fused
        return True if wanted else None


class _OfParts(torch.optim.AdamW):
    """Torch's, which computes on what this rank holds of shared-out tensors; what it keeps is shared out too.

    An update is made value by value, so that nothing else is needed; and of all shared-out tensors together
    torch first asks, for each of them, how all of them are shared out.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        is_complex: bool = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(local, tensors)
        return is_complex


def build(cfg: AdamWConfig, _deps: Any) -> AdamW | Maker:
    """Make the optimizer's factory of a config."""
    if cfg.rounding == "nearest" and cfg.master_weights is None and not cfg.offload:
        return AdamW(cfg)
    return Maker(cfg, lambda: Adam(cfg, cfg.fused))


def build_8bit(cfg: AdamW8bitConfig, _deps: Any) -> Maker:
    """Make the factory of the optimizer with state in 8 bits."""
    return Maker(cfg, lambda: Adam8bit(cfg))
