"""The CogVideoX family: transformer and 3D causal autoencoder of every released variant."""

from __future__ import annotations

from collections.abc import Iterable

from cvx_core import Component, hookimpl
from cvx_plugins.cogvideox.names import names_components
from cvx_plugins.cogvideox.predictor_config import predictor_components
from cvx_plugins.cogvideox.vae_config import autoencoder_components


@hookimpl
def cvx_components() -> Iterable[Component]:
    yield from predictor_components()
    yield from autoencoder_components()
    yield from names_components()
