"""Config and presets of the CogVideoX autoencoder."""
from collections.abc import Iterable

from cvx_core import Component


def autoencoder_components() -> Iterable[Component]:
    yield from ()
