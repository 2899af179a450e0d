"""Built-in optimizers. The implementations import torch when they are built."""

from __future__ import annotations

from collections.abc import Iterable

from cvx_core import Component, hookimpl
from cvx_plugins.optimizers.adamw_config import AdamWConfig


@hookimpl
def cvx_components() -> Iterable[Component]:
    yield Component(
        "optimizer", "adamw", AdamWConfig, "cvx_plugins.optimizers.adamw:build", summary="AdamW of torch"
    )
