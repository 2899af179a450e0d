"""Built-in text encoders. The implementation imports its libraries when it is built."""

from __future__ import annotations

from collections.abc import Iterable

from cvx_core import Component, hookimpl
from cvx_plugins.encoders.t5_config import XXL, T5Config


@hookimpl
def cvx_components() -> Iterable[Component]:
    target = "cvx_plugins.encoders.t5:build"
    yield Component("text_encoder", "t5", T5Config, target, summary="T5 v1.1 encoder of any size")
    yield Component(
        "text_encoder", "t5-xxl", T5Config, target, XXL, summary="T5 v1.1 XXL, the encoder of every CogVideoX"
    )
