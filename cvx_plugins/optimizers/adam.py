"""The rules of AdamW by torch's own function: with state in full, and in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from cvx_plugins.optimizers.adamw_config import BLOCKS, SHORTEST, AdamConfig, AdamW8bitConfig, fits
from cvx_plugins.optimizers.blockwise import dequantised, quantise
from cvx_plugins.optimizers.stepper import State

FUSED_DEVICES = {"cuda", "cpu"}
MEAN, SQUARE = "exp_avg", "exp_avg_sq"


class Adam:
    """AdamW with state in full. Names in state and groups are torch's, and either goes on from the other."""

    parted = True

    def __init__(self, cfg: AdamConfig, fused: Literal["auto"] | bool = "auto"):
        torchs = torch.optim.AdamW([nn.Parameter(torch.empty(0))], betas=cfg.betas, eps=cfg.eps).defaults
        self.group: Mapping[str, Any] = {
            key: value for key, value in torchs.items() if key not in ("lr", "weight_decay")
        }
        self._cfg, self._fused = cfg, fused

    def start(self, name: str, weight: Tensor) -> State:
        """Return the state before the first step."""
        return {MEAN: torch.zeros_like(weight), SQUARE: torch.zeros_like(weight)}

    def misfit(self, length: int) -> str:
        """Return why a part of a row of that many values cannot be; "" if it can."""
        return ""

    def update(
        self, weight: Tensor, gradient: Tensor, state: State, step: int, group: Mapping[str, Any]
    ) -> None:
        """Change a weight in place."""
        fused = weight.device.type in FUSED_DEVICES if self._fused == "auto" else self._fused
        beta1, beta2 = group["betas"]
        adamw(
            [weight],
            [gradient],
            [state[MEAN]],
            [state[SQUARE]],
            [],
            [torch.tensor(float(step - 1), device=weight.device if fused else "cpu")],
            foreach=False,
            fused=fused,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class Adam8bit(Adam):
    """AdamW with a byte, and a share of a scale, for each value of its two states."""

    def __init__(self, cfg: AdamW8bitConfig):
        super().__init__(cfg)
        self._block = cfg.block

    def start(self, name: str, weight: Tensor) -> State:
        """Return the state before the first step."""
        length = prod(weight.shape[1:])
        if weight.ndim < 2 or length < SHORTEST:
            return super().start(name, weight)
        state = {}
        for key in (MEAN, SQUARE):
            state[f"{key}_codes"] = torch.zeros_like(weight, dtype=torch.uint8)
            state[f"{key}_scale"] = torch.zeros(
                weight.shape[0], -(-length // self._block), device=weight.device
            )
        return state

    def misfit(self, length: int) -> str:
        """Return why a part of a row of that many values cannot be; "" if it can."""
        if fits(length, self._block):
            return ""
        fitting = [size for size in BLOCKS if fits(length, size)]
        remedy = f"block: {fitting[0]}" if fitting else "another size of tp, or adamw"
        return f"which optimizer.block {self._block} does not divide. Use {remedy}."

    def update(
        self, weight: Tensor, gradient: Tensor, state: State, step: int, group: Mapping[str, Any]
    ) -> None:
        """Change a weight in place, by the exact states, which are then kept in 8 bits."""
        if MEAN in state:
            return super().update(weight, gradient, state, step, group)
        full = {}
        for key in (MEAN, SQUARE):
            codes, scale = state[f"{key}_codes"], state[f"{key}_scale"]
            values = dequantised(codes, scale, is_signed=key == MEAN, block=self._block)
            full[key] = values.to(weight.dtype)
        super().update(weight, gradient, full, step, group)
        for key in (MEAN, SQUARE):
            codes, scale = state[f"{key}_codes"], state[f"{key}_scale"]
            quantise(full[key], codes, scale, is_signed=key == MEAN, block=self._block)
        return None
