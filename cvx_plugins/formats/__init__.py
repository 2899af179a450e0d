"""Built-in formats. The implementations import their libraries when they are built."""

from __future__ import annotations

from collections.abc import Iterable

from cvx_core import Component, hookimpl


@hookimpl
def cvx_components() -> Iterable[Component]:
    yield from ()
