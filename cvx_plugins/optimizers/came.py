"""The rule of CAME (Luo et al. 2023, algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cvx_plugins.optimizers.came_config import CameConfig
from cvx_plugins.optimizers.stepper import Maker, State


class Came:
    """Squares of a matrix, or of a kernel as one of (rows, all else), are kept as means along both dims."""

    parted = False

    def __init__(self, cfg: CameConfig):
        self._cfg = cfg
        self.group: Mapping[str, Any] = {}

    def misfit(self, length: int) -> str:
        """Return why a part of a row of that many values cannot be; "" if it can."""
        return ""

    def start(self, name: str, weight: Tensor) -> State:
        """Return the state before the first step."""
        state = {"exp_avg": torch.zeros_like(weight)}
        if weight.ndim < 2:
            return {**state, "exp_avg_sq": torch.zeros_like(weight)}
        matrix = weight.flatten(1)
        for key in ("exp_avg_sq", "exp_avg_res"):
            state |= {f"{key}_row": torch.zeros_like(matrix[:, 0]), f"{key}_col": torch.zeros_like(matrix[0])}
        return state

    def update(
        self, weight: Tensor, gradient: Tensor, state: State, step: int, group: Mapping[str, Any]
    ) -> None:
        """Change a weight in place."""
        beta1, beta2, beta3 = self._cfg.betas
        eps, eps_instability = self._cfg.eps
        squares, mean = gradient.square() + eps, state["exp_avg"]
        if weight.ndim < 2:
            update = gradient * state["exp_avg_sq"].lerp_(squares, 1 - beta2).rsqrt()
        else:
            update = gradient * _inverse_root(squares, state, "exp_avg_sq", beta2)
        update /= (_rms(update) / self._cfg.clip_threshold).clamp_min(1.0)
        mean.lerp_(update, 1 - beta1)
        if weight.ndim < 2:
            change = mean
        else:
            instability = (update - mean).square_().add_(eps_instability)
            change = mean * _inverse_root(instability, state, "exp_avg_res", beta3)
        weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=group["lr"])


def _inverse_root(squares: Tensor, state: State, key: str, beta: float) -> Tensor:
    """Take squares into their running means along both dims; return 1 / root of what these make of them."""
    matrix = squares.flatten(1)
    row = state[f"{key}_row"].lerp_(matrix.mean(1), 1 - beta)
    col = state[f"{key}_col"].lerp_(matrix.mean(0), 1 - beta)
    return torch.outer((row / row.mean()).rsqrt(), col.rsqrt()).view(squares.shape)


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def build(cfg: CameConfig, _deps: Any) -> Maker:
    """Make the optimizer's factory of a config."""
    return Maker(cfg, lambda: Came(cfg))
