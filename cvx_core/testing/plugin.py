"""Conformance of a plugin package: discovery is torch-free, names are unique, configs stand on their own."""

from __future__ import annotations

import subprocess
import sys

from cvx_core.registry import Component, Registry
from cvx_core.testing import Suite


def suite(plugin: str) -> Suite:
    """Return the checks of one entry point of group `cvx`, by the entry point's name."""

    def is_discovered() -> None:
        registry = Registry.discover()
        broken = {failure.plugin: failure.error for failure in registry.failures}
        assert plugin not in broken, f"plugin {plugin!r} fails to load: {broken.get(plugin)}"
        assert _components(plugin), (
            f"plugin {plugin!r} yields no component; is its entry point in group `cvx`?"
        )

    def imports_no_torch() -> None:
        code = (
            "import sys, importlib.metadata as m\n"
            f"[p.load().cvx_components() for p in m.entry_points(group='cvx', name={plugin!r})]\n"
            "heavy = {'torch', 'transformers', 'diffusers', 'av', 'decord'} & set(sys.modules)\n"
            "sys.exit(f'imports {sorted(heavy)} while it is discovered' if heavy else 0)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def every_config_constructs_bare() -> None:
        for component in _components(plugin):
            if component.config is not None:
                component.config()

    def every_preset_is_valid() -> None:
        for component in _components(plugin):
            if component.config is not None:
                component.config.model_validate(dict(component.preset))

    def every_field_says_what_it_means() -> None:
        for component in _components(plugin):
            fields = component.config.model_fields if component.config is not None else {}
            silent = [name for name, field in fields.items() if not field.description]
            assert not silent, f"{component.name}: fields without a docstring: {silent}"

    def every_component_has_a_summary() -> None:
        silent = [c.name for c in _components(plugin) if c.kind != "names" and not c.summary]
        assert not silent, f"components without a summary for --list: {silent}"

    def every_target_can_be_imported() -> None:
        for component in _components(plugin):
            component.load()

    return Suite.of(
        plugin,
        is_discovered,
        imports_no_torch,
        every_config_constructs_bare,
        every_preset_is_valid,
        every_field_says_what_it_means,
        every_component_has_a_summary,
        every_target_can_be_imported,
    )


def _components(plugin: str) -> list[Component]:
    """Return what one entry point yields."""
    from importlib.metadata import entry_points

    return [
        component
        for point in entry_points(group="cvx", name=plugin)
        for component in point.load().cvx_components()
    ]
