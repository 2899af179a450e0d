"""Fields of the running average of weights. Free of torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cvx_core import Config
from cvx_core.config import NonNegative


class EmaConfig(Config):
    """A running average of the trained weights, in at least float32, beside them on the device."""

    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9999
    """Share of the average that a step keeps."""
    start: NonNegative = 0
    """Steps after which averaging begins; until then the average is the weights."""
    warmup: bool = True
    """Let the decay rise with the steps n since `start`, as (1 + n) / (10 + n), up to `decay`."""
    export: bool = True
    """Export the average in place of the weights; checkpoints hold both in any case."""
