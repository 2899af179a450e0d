"""The core of cvx: recipe, registry, spec, build, place. Importing it imports no torch."""

from cvx_core.card import Card
from cvx_core.config import Config, InputPath, OutputPath
from cvx_core.errors import CvxError, FormatError, PluginError, Problem, RecipeError
from cvx_core.hooks import hookimpl
from cvx_core.interfaces import Plan
from cvx_core.registry import Choice, Component, Registry

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
    "hookimpl",
]
