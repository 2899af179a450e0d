"""The config base of strategies: when one is applied, and what it asks of the mesh. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator

from cvx_core.config import Config, Positive
from cvx_core.degrees import Degrees, Request

if TYPE_CHECKING:
    from cvx_core.spec import Spec


OWN = "cvx"
"""The package whose strategies are compared in pairs: tests/distributed/pairs.py."""


def _not_auto(value: Any) -> Any:
    if value == "auto":
        raise ValueError(
            "got 'auto', which only strategies that read different rows take: ddp, zero1, zero2, zero3 and "
            "layerzero get the ranks that the others leave. State a number."
        )
    return value


Ranks = Annotated[Positive, BeforeValidator(_not_auto)]
"""Ranks along an axis that nothing is left over for."""


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
    fields: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """{field: axes whose ranks, multiplied, it states}, so that messages say which field to change"""
    usual: ClassVar[Mapping[str, int]] = {}
    """{axis: ranks where a field of it is null}, or as many as there are data ranks, if fewer"""
    compared: ClassVar[tuple[str, ...]] = ()
    """Strategies beside which it was compared with one process, for those that are not cvx's own"""

    def degrees(self) -> Mapping[str, int | None]:
        """Return {axis of the mesh: ranks, None to take what is left}."""
        return {}

    def request(self, name: str) -> Request:
        """Return what it asks of the mesh. name: of the strategy."""
        null = {axes[0] for field, axes in self.fields.items() if getattr(self, field) is None}
        usual = {axis: ranks for axis, ranks in self.usual.items() if axis in null}
        return Request(name, self.degrees(), self.fields, usual)

    def notes(self, spec: Spec, mesh: Degrees | None) -> Iterable[str]:
        """Yield what is allowed but worth knowing. mesh: None where the number of processes is not known."""
        return ()


def strategy_notes(spec: Spec, mesh: Degrees | None) -> Iterable[str]:
    """Yield what strategies say, and pairs with those of other packages that nobody says were compared."""
    for choice in spec.parallel:
        yield from choice.config.notes(spec, mesh)
    for one, other in combinations(spec.parallel, 2):
        strange = [c for c in (one, other) if spec.registry.package(c.component) != OWN]
        if strange and one.name not in other.config.compared and other.name not in one.config.compared:
            first, second = strange[0], other if strange[0] is one else one
            yield f"{first.name} with {second.name}: this pair is not among those compared with one process"
