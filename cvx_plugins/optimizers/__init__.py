"""Built-in optimizers. The implementations import torch when they are built."""

from __future__ import annotations

from collections.abc import Iterable

from cvx_core import Component, hookimpl
from cvx_plugins.optimizers.adamw_config import AdamW8bitConfig, AdamWConfig
from cvx_plugins.optimizers.came_config import CameConfig
from cvx_plugins.optimizers.prodigy_config import ProdigyConfig


@hookimpl
def cvx_components() -> Iterable[Component]:
    folder = "cvx_plugins.optimizers"
    yield Component("optimizer", "adamw", AdamWConfig, f"{folder}.adamw:build", summary="AdamW of torch")
    yield Component(
        "optimizer",
        "adamw-8bit",
        AdamW8bitConfig,
        f"{folder}.adamw:build_8bit",
        summary="AdamW, 2 bytes of state a weight",
    )
    yield Component(
        "optimizer",
        "came",
        CameConfig,
        f"{folder}.came:build",
        summary="squares of gradients as a row and a column",
    )
    yield Component(
        "optimizer",
        "prodigy",
        ProdigyConfig,
        f"{folder}.prodigy:build",
        summary="Adam that finds its step size itself",
    )
