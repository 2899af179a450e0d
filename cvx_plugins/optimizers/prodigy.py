"""The rule of Prodigy (Mishchenko & Defazio 2023, algorithm 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from cvx_plugins.optimizers.prodigy_config import ProdigyConfig
from cvx_plugins.optimizers.stepper import Maker, State


class Prodigy:
    """Adam's update times a step size d, which sums over all parameters bound from below.

    Groups hold d, its largest estimate, the numerator of the estimate, and how many updates were made.
    """

    parted = False

    def __init__(self, cfg: ProdigyConfig):
        self._cfg = cfg
        self._beta3 = sqrt(cfg.betas[1]) if cfg.beta3 is None else cfg.beta3
        self.group: Mapping[str, Any] = {"d": cfg.d0, "d_max": cfg.d0, "d_numerator": 0.0, "updates": 0}
        self._sums: list[tuple[Tensor, Tensor]] = []
        self._size = 0.0

    def misfit(self, length: int) -> str:
        """Return why a part of a row of that many values cannot be; "" if it can."""
        return ""

    def start(self, name: str, weight: Tensor) -> State:
        """Return the state before the first step."""
        zeros = {key: torch.zeros_like(weight) for key in ("s", "exp_avg", "exp_avg_sq")}
        return {"p0": weight.clone(), **zeros}

    def observe(self, weight: Tensor, gradient: Tensor, state: State, group: Mapping[str, Any]) -> None:
        """Take a gradient into the running means and into the sums of the estimate."""
        if not group["lr"]:
            return
        cfg, d, (beta1, beta2) = self._cfg, group["d"], self._cfg.betas
        if group["weight_decay"] and not cfg.decouple:
            gradient = gradient + weight * group["weight_decay"]
        self._size = d * group["lr"] * self._correction(group["updates"] + 1)
        state["exp_avg"].mul_(beta1).add_(gradient, alpha=d * (1 - beta1))
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=d * d * (1 - beta2))
        share = d / cfg.d0
        added = share * (d if cfg.safeguard_warmup else self._size)
        state["s"].mul_(self._beta3).add_(gradient, alpha=added)
        moved = (gradient * (state["p0"] - weight)).sum(dtype=torch.float64)
        self._sums.append((share * self._size * moved, state["s"].abs().sum(dtype=torch.float64)))

    def settle(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Estimate d anew. Returns whether there is anything to go by."""
        numerator = float(sum(own for own, _ in self._sums))
        denominator = float(sum(own for _, own in self._sums))
        self._sums.clear()
        if not denominator:
            return False
        first = groups[0]
        numerator += self._beta3 * first["d_numerator"]
        estimate = self._cfg.d_coef * numerator / denominator
        d = max(first["d"], estimate) if first["d"] == self._cfg.d0 else first["d"]
        d_max = max(first["d_max"], estimate)
        d = d_max if self._cfg.growth_rate is None else min(d_max, d * self._cfg.growth_rate)
        for group in groups:
            group |= {"d": d, "d_max": d_max, "d_numerator": numerator, "updates": first["updates"] + 1}
        return True

    def update(
        self, weight: Tensor, gradient: Tensor, state: State, step: int, group: Mapping[str, Any]
    ) -> None:
        """Change a weight in place."""
        if group["weight_decay"] and self._cfg.decouple:
            weight.mul_(1 - group["weight_decay"] * self._size)
        root = state["exp_avg_sq"].sqrt().add_(group["d"] * self._cfg.eps)
        weight.addcdiv_(state["exp_avg"], root, value=-self._size)

    def _correction(self, count: int) -> float:
        beta1, beta2 = self._cfg.betas
        return sqrt(1 - beta2**count) / (1 - beta1**count) if self._cfg.bias_correction else 1.0


def build(cfg: ProdigyConfig, _deps: Any) -> Maker:
    """Make the optimizer's factory of a config."""
    return Maker(cfg, lambda: Prodigy(cfg))
