"""The config base of strategies: when one is applied, and what it asks of the mesh. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import ClassVar

from cvx_core.config import Config


class Stage(IntEnum):
    """When a strategy is applied; the order in a recipe's list does not matter."""

    ADAPT = 0
    PIPELINE = 1
    TENSOR = 2
    CONTEXT = 3
    AUTOENCODER = 4
    RUN = 5
    COMPILE = 6
    SHARD = 7
    FEED = 8


class StrategyConfig(Config):
    """Fields of a strategy. A subclass states its stage, and the axes it owns, if any."""

    stage: ClassVar[Stage]

    def degrees(self) -> Mapping[str, int | None]:
        """Return {axis of the mesh: ranks, None to take what is left}."""
        return {}
