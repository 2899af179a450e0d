"""The plugin lock: which installed package provides each component of a run, in which version."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

from cvx_core.hooks import GROUP
from cvx_core.nesting import choices_in
from cvx_core.registry import Choice, Component


def components_of(choices: Iterable[Choice]) -> Iterator[Component]:
    """Yield the components of choices, those of their weights and of nested fields included."""
    for choice in choices:
        yield choice.component
        if choice.weights is not None:
            yield from components_of([choice.weights])
        yield from components_of(choices_in(choice.config))


def plugin_lock(used: Iterable[Component]) -> list[dict[str, Any]]:
    """Return the plugins that provide the components, each with package, version and entry point.

    A component that no entry point provides, such as one given directly, stands under entry point null.
    """
    wanted = {(component.kind, component.name): component for component in used}
    plugins = []
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: point.name):
        names = [key for key in _provided(point) if key in wanted]
        if names:
            package = point.dist.name if point.dist is not None else None
            version = point.dist.version if point.dist is not None else None
            plugins.append(_entry(point.name, point.value, package, version, names))
            wanted = {key: component for key, component in wanted.items() if key not in names}
    if wanted:
        plugins.append(_entry(None, None, None, None, sorted(wanted)))
    return plugins


def _entry(
    point: str | None, module: str | None, package: str | None, version: str | None, names: Iterable[Any]
) -> dict[str, Any]:
    components = [f"{kind}:{name}" for kind, name in names]
    return {
        "entry_point": point,
        "module": module,
        "package": package,
        "version": version,
        "components": components,
    }


def _provided(point: metadata.EntryPoint) -> list[tuple[str, str]]:
    """Return kind and name of what an entry point provides; nothing where it cannot be loaded."""
    try:
        return [(component.kind, component.name) for component in point.load().cvx_components()]
    except Exception:  # a broken plugin provides nothing; the registry names it when somebody asks for it
        return []
