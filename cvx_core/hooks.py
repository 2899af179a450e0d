"""The pluggy markers and the one hook a plugin implements."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from cvx_core.registry import Component

GROUP = "cvx"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def cvx_components() -> Iterable[Component]:
    """Yield the components that this package provides. Must not import torch."""
    return ()
