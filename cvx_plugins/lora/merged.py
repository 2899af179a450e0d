"""LoRA files worked into a predictor's weights while these are loaded, as `cvx convert --merge-lora` does."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from cvx_core.interfaces import Deps, Tensors
from cvx_io.lora import alphas_of, merge, modules, with_alpha
from cvx_plugins.lora.adapter_config import MergedLoraConfig

log = logging.getLogger("cvx")


class MergedLora:
    """The `merged-lora` adapter. Costs nothing while sampling, and works under every strategy."""

    def __init__(self, cfg: MergedLoraConfig, deps: Deps):
        self.cfg = cfg

    def changed(self, base: Tensors, tensors: Tensors, where: str) -> tuple[Tensors, Mapping[str, Any]]:
        """Return the predictor's tensors with W + scale * alpha / r * B A, and an account of the file.

        A scale of 0 leaves every bit as it is. Raises FormatError where a module of the file is not the
        predictor's, or states no alpha and none is given.
        """
        scale = self.cfg.scale
        stated = with_alpha(tensors, self.cfg.alpha, where)
        shapes = modules(stated)
        result = merge(base, stated, scale, where)
        alphas = sorted(set(alphas_of(stated).values()))
        log.info("adapters: %s at %g: %d modules, alpha %s", where, scale, len(shapes), _few(alphas))
        account = {"scale": scale, "alphas": alphas, "modules": list(shapes)}
        dropped = dict(tensors.dropped)
        if scale == 0:
            reason = "its scale is 0, so it changes nothing"
            log.warning("adapters: %s: %s", where, reason)
            dropped |= dict.fromkeys(tensors.index, reason)
        return base if scale == 0 else result, {**account, "dropped": dropped}


def _few(values: list[float]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:4])
    return shown if len(values) <= 4 else f"{shown} and others"
