"""AdamW with the usual exemption from weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cvx_core import CvxError, PluginError
from cvx_core.errors import did_you_mean
from cvx_core.interfaces import ParamGroup
from cvx_plugins.optimizers.adamw_config import AdamWConfig

OPTIONS = ("lr", "betas", "eps", "weight_decay")
FUSED_DEVICES = {"cuda", "cpu"}


@dataclass(frozen=True)
class AdamW:
    """Makes torch.optim.AdamW."""

    cfg: AdamWConfig

    def build(self, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
        """Return the optimizer of the given parameters; a group's options override the config's.

        A group comes apart into decayed and exempt parameters, and by device mesh, since torch's kernels take
        no mixture of meshes. Raises PluginError for an unknown option, CvxError where there is nothing to
        optimise.
        """
        split = [part for group in groups for part in self._split(group)]
        if not split:
            raise CvxError(
                "optimizer: no parameters to train. Is everything frozen, or do adapter targets match none?"
            )
        cfg = self.cfg
        fused = self._fused({p.device.type for part in split for p in part["params"]})
        return torch.optim.AdamW(
            split, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay, fused=fused
        )

    def _split(self, group: ParamGroup) -> list[dict[str, Any]]:
        for option in group.options:
            if option not in OPTIONS:
                hint = did_you_mean(option, OPTIONS)
                raise PluginError(
                    f"optimizer 'adamw': a parameter group sets unknown option {option!r}.{hint}"
                )
        parts: dict[tuple[bool, Any], list[Tensor]] = {}
        for name, parameter in group.params:
            is_decayed = self.cfg.decay_norms or not (parameter.ndim < 2 or name.endswith("bias"))
            parts.setdefault((is_decayed, getattr(parameter, "device_mesh", None)), []).append(parameter)
        return [
            {"params": params, **group.options, **({} if is_decayed else {"weight_decay": 0.0})}
            for (is_decayed, _), params in parts.items()
        ]

    def _fused(self, devices: set[str]) -> bool | None:
        """Return torch's argument: True, or None for its default."""
        wanted = devices <= FUSED_DEVICES if self.cfg.fused == "auto" else self.cfg.fused
        return True if wanted else None


def build(cfg: AdamWConfig, _deps: Any) -> AdamW:
    """Make the optimizer's factory of a config."""
    return AdamW(cfg)
