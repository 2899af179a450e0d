"""Fields of a parameter group. Free of torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from cvx_core import Config

NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class GroupConfig(Config):
    """Parameters that an optimizer treats in a way of their own."""

    match: str = "*"
    """Names of parameters; * stands for any text, ? for one character, [12] for one of some."""
    lr: NonNegativeFloat | None = None
    """Peak learning rate; null: the optimizer's."""
    weight_decay: NonNegativeFloat | None = None
    """Decay of those of them that decay at all; null: the optimizer's."""

    @property
    def options(self) -> dict[str, Any]:
        """What the group sets."""
        return self.model_dump(exclude={"match"}, exclude_none=True)

    @model_validator(mode="after")
    def _sets_something(self) -> GroupConfig:
        if not self.options:
            raise ValueError(f"group {self.match!r} sets nothing. Give it lr or weight_decay, or remove it.")
        return self
