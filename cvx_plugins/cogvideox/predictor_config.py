"""Config and presets of the CogVideoX transformer."""
from collections.abc import Iterable

from cvx_core import Component


def predictor_components() -> Iterable[Component]:
    yield from ()
