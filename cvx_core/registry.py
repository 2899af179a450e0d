"""Components, and the registry that finds them through entry points without importing torch."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, get_args

import pluggy

from cvx_core import hooks
from cvx_core.config import Config
from cvx_core.errors import PluginError, did_you_mean

Kind = Literal[
    "predictor",
    "text_encoder",
    "autoencoder",
    "scheduler",
    "dataset",
    "reader",
    "optimizer",
    "adapter",
    "strategy",
    "format",
    "names",
    "task",
    "tracker",
]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Component:
    """One thing a recipe can name.

    kind: one of KINDS; name: what a recipe writes after `use:`, kebab-case; config: its typed fields (None
    for names tables); target: "package.module:object", imported only when it is built; preset: default field
    values of this name; summary: one line for `--list`.
    """

    kind: Kind
    name: str
    config: type[Config] | None
    target: str
    preset: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""

    def load(self) -> Any:
        """Import and return the target. Raises PluginError where the import or the attribute fails."""
        module_name, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise PluginError(
                f"{self.kind} {self.name!r}: target {self.target!r} cannot be imported: {error}. "
                "Install what it needs, or fix the plugin's target."
            ) from error


@dataclass(frozen=True)
class Choice:
    """A component together with the config a recipe gave it, and the format its weights come from."""

    component: Component
    config: Any
    weights: Choice | None = None

    @property
    def name(self) -> str:
        return self.component.name

    def build(self, deps: Any = None) -> Any:
        """Call the component's target with its config and what is already built."""
        return self.component.load()(self.config, deps)


@dataclass(frozen=True)
class Failure:
    """A plugin that could not be loaded: its entry point, package and the error's text."""

    plugin: str
    package: str
    error: str


class Registry:
    """An immutable set of components. It is passed along, never global."""

    def __init__(
        self,
        components: Iterable[Component | tuple[Component, str]] = (),
        failures: Iterable[Failure] = (),
        torch_importers: Iterable[str] = (),
    ):
        """Take components, each alone or with the package it came from. Raises PluginError on a name given
        twice.
        """
        self.failures = tuple(failures)
        self.torch_importers = tuple(torch_importers)
        self._components: dict[tuple[str, str], Component] = {}
        self._packages: dict[tuple[str, str], str] = {}
        for item in components:
            component, package = item if isinstance(item, tuple) else (item, "(given directly)")
            self._add(component, package)

    @classmethod
    def discover(cls) -> Registry:
        """Load every entry point of group `cvx`, each on its own, so that a broken one harms nobody else."""
        manager = pluggy.PluginManager(hooks.GROUP)
        manager.add_hookspecs(hooks)
        found: list[tuple[Component, str]] = []
        failures, torch_importers = [], []
        for package, point in _points():
            had_torch = "torch" in sys.modules
            try:
                module = point.load()
                manager.register(module, name=f"{package}:{point.name}")
                found += [(component, package) for component in _components(module)]
            except Exception as error:  # a plugin may fail in any way; it is named when somebody asks for it
                failures.append(Failure(point.name, package, f"{type(error).__name__}: {error}"))
            if not had_torch and "torch" in sys.modules:
                torch_importers.append(point.name)
                warnings.warn(
                    f"plugin {point.name!r} of {package} imports torch while it is discovered; "
                    "move the import into the component's target.",
                    stacklevel=2,
                )
        return cls(found, failures, torch_importers)

    def get(self, kind: str, name: str) -> Component:
        """Return a component. Raises PluginError with the nearest name and the plugins that failed."""
        if (kind, name) in self._components:
            return self._components[kind, name]
        names = self.names(kind)
        hint = self._hint(kind, name) or did_you_mean(name, names)
        message = f"no {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}."
        for failure in self.failures:
            message += f" Plugin {failure.plugin!r} of {failure.package} failed to load: {failure.error}."
        raise PluginError(message)

    def package(self, component: Component) -> str:
        """Return the package that a component comes from."""
        return self._packages[component.kind, component.name]

    def names(self, kind: str) -> list[str]:
        """Return the sorted names of a kind."""
        return sorted(name for k, name in self._components if k == kind)

    def all(self, kind: str | None = None) -> list[tuple[Component, str]]:
        """Return every component with its package, in order of kind and name."""
        keys = sorted(key for key in self._components if kind in (None, key[0]))
        return [(self._components[key], self._packages[key]) for key in keys]

    def table(self, family: str, format: Component) -> Any:
        """Return a family's names table in a format; None where the format's names are the canonical ones.

        Raises PluginError naming the formats that the family has names in.
        """
        if ("names", f"{family}:{format.name}") in self._components:
            return self.get("names", f"{family}:{format.name}").load()
        if getattr(format.config, "canonical", False):
            return None
        known = [name.rpartition(":") for name in self.names("names")]
        able = {owner for name, _, owner in known if name == family}
        able |= {c.name for c, _ in self.all("format") if _keeps_names(c)}
        raise PluginError(
            f"{family!r} has no names in format {format.name!r}. It has them in: {', '.join(sorted(able))}."
        )

    def _hint(self, kind: str, name: str) -> str:
        """Return what to write for what others call so, "" where nothing is known."""
        called: dict[str, str] = {}
        for component, _ in self.all(kind):
            called |= component.config.also_called if component.config is not None else {}
        return f" Here that is {called[name]}." if name in called else ""

    def _add(self, component: Component, package: str) -> None:
        if component.kind not in KINDS:
            hint = did_you_mean(component.kind, KINDS)
            raise PluginError(
                f"{package}: component {component.name!r} has unknown kind {component.kind!r}.{hint}"
            )
        key = (component.kind, component.name)
        if key in self._components:
            raise PluginError(
                f"{component.kind} {component.name!r} is provided by {self._packages[key]} and by {package}. "
                "Uninstall one of them, or prefix the name with the package's own."
            )
        self._components[key], self._packages[key] = component, package


def _keeps_names(format: Component) -> bool:
    """Tell whether a format holds any model's weights under canonical names."""
    return bool(getattr(format.config, "canonical", False)) and not hasattr(format.config, "holds")


def _components(module: Any) -> list[Component]:
    components = list(module.cvx_components())
    for component in components:
        if not isinstance(component, Component):
            raise PluginError(f"cvx_components() yielded {component!r}; expected a cvx_core.Component")
    return components


def _points() -> list[tuple[str, EntryPoint]]:
    """Return the entry points of group `cvx` with their packages, in order of packages and names."""
    names: dict[int, str] = {}  # a distribution reads all of its metadata whenever it is asked for its name
    points = []
    for point in entry_points(group=hooks.GROUP):
        key = id(point.dist)
        if key not in names:
            names[key] = point.dist.name if point.dist is not None else "(unknown package)"
        points.append((names[key], point))
    return sorted(points, key=lambda item: (item[0], item[1].name))
