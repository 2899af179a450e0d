"""The OpenSoraPlan 1.2 family: names of its weights, and the checkpoints its training writes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from cvx_core import Component, Config, hookimpl
from cvx_core.config import InputPath
from cvx_plugins.opensoraplan.names import names_components


class CkptConfig(Config):
    """A training checkpoint in one .ckpt file, with weights, their moving average and more. Read only."""

    path: InputPath | None = None
    """The file, or a folder with one such file. Needed to read."""
    weights: Literal["ema", "model"] = "ema"
    """Which weights to read: their moving average where the file has one, or always the trained ones."""


@hookimpl
def cvx_components() -> Iterable[Component]:
    yield Component(
        "format",
        "ckpt",
        CkptConfig,
        "cvx_plugins.opensoraplan.ckpt:ckpt_format",
        summary="Training checkpoints: one .ckpt with ema_state_dict or state_dict, read only",
    )
    yield from names_components()
