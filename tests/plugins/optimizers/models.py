"""Optimizers by name, and small models to try them on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cvx_core import Registry
from cvx_core.interfaces import ParamGroup

REGISTRY = Registry.discover()


def maker(use: str, **fields: Any) -> Any:
    component = REGISTRY.get("optimizer", use)
    assert component.config is not None
    return component.load()(component.config(**fields), None)


def built(use: str, module: nn.Module, **fields: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = maker(use, **fields).build(
        [ParamGroup(list(module.named_parameters()), {})]
    )
    return optimizer


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return one with matrices whose rows fill blocks, and do not, a kernel, and vectors."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 9, 5), nn.Flatten(), nn.Linear(9 * 16, 300), nn.LayerNorm(300), nn.Linear(300, 2)
    ).to(dtype)


def loss_of(module: nn.Module, step: int) -> Tensor:
    """Return how far a model is from telling bright images from dark ones."""
    dtype = next(module.parameters()).dtype
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    images += torch.linspace(-1, 1, 8).view(8, 1, 1, 1)
    return (module(images.to(dtype)) - torch.linspace(-1, 1, 8).view(8, 1).to(dtype)).square().mean()


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    """Return the loss before each step."""
    losses = []
    for step in range(first, first + steps):
        loss = loss_of(module, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses
