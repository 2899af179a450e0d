"""The core of cvx: recipe, registry, spec, building, placing. Importing it imports no torch.

The library's form of a run:

    import cvx_core as cvx

    spec = cvx.resolve(cvx.load("recipe.yaml", {"task.steps": 5}))
    parts = cvx.place(cvx.build(spec), spec)
    parts.task.run(parts, spec)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cvx_core.card import Card
from cvx_core.config import Config, InputPath, OutputPath
from cvx_core.errors import CvxError, FormatError, PluginError, Problem, RecipeError
from cvx_core.hooks import hookimpl
from cvx_core.interfaces import Plan
from cvx_core.recipe import load
from cvx_core.registry import Choice, Component, Registry
from cvx_core.spec import Spec, resolve

if TYPE_CHECKING:
    from cvx_core.building import build
    from cvx_core.placing import place

__all__ = [
    "Card",
    "Choice",
    "Component",
    "Config",
    "CvxError",
    "FormatError",
    "InputPath",
    "OutputPath",
    "Plan",
    "PluginError",
    "Problem",
    "RecipeError",
    "Registry",
    "Spec",
    "build",
    "hookimpl",
    "load",
    "place",
    "resolve",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for."""
    if name == "build":
        from cvx_core.building import build

        return build
    if name == "place":
        from cvx_core.placing import place

        return place
    raise AttributeError(f"module 'cvx_core' has no attribute {name!r}")
