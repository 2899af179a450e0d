"""Discovery: lazy, isolated, and clear about collisions."""

import sys
from importlib.metadata import EntryPoint

import pytest

from cvx_core import Component, Config, PluginError, Registry, registry


class Empty(Config):
    pass


def component(name, kind="predictor", target="nowhere:build"):
    return Component(kind, name, Empty, target)


def test_a_name_given_twice_names_both_packages():
    with pytest.raises(PluginError, match="provided by one and by two"):
        Registry([(component("a"), "one"), (component("a"), "two")])


def test_an_unknown_name_gets_the_nearest_and_the_known_ones():
    found = Registry([component("wavedit"), component("other")])
    with pytest.raises(
        PluginError, match=r"no predictor 'wavdit'. Did you mean 'wavedit'\? Known: other, wavedit."
    ):
        found.get("predictor", "wavdit")


def test_an_unknown_kind_is_the_plugin_authors_error():
    with pytest.raises(PluginError, match=r"unknown kind 'predicter'\. Did you mean 'predictor'"):
        Registry([(component("a", kind="predicter"), "acme")])


def test_a_target_that_cannot_be_imported_names_the_component():
    with pytest.raises(PluginError, match="predictor 'a': target 'nowhere:build' cannot be imported"):
        component("a").load()
    with pytest.raises(PluginError, match="cvx_core:nothing"):
        component("a", target="cvx_core:nothing").load()


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """Let a test write plugin modules that discovery finds as the only ones."""
    monkeypatch.syspath_prepend(tmp_path)
    points = []
    monkeypatch.setattr(registry, "entry_points", lambda group: points)

    def add(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        points.append(EntryPoint(name, name, "cvx"))

    yield add
    for point in points:
        sys.modules.pop(point.name, None)


GOOD = """
from cvx_core import Component, Config, hookimpl
class C(Config): pass
@hookimpl
def cvx_components():
    yield Component("predictor", "good", C, "good_plugin:build")
"""


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import not_there_at_all", "No module named 'not_there_at_all'"),
        ("1/0", "ZeroDivisionError"),
        ("def cvx_components():\n    return [3]", "expected a cvx_core.Component"),
        ("x = 1", "cvx_components"),
    ],
)
def test_a_broken_plugin_harms_nobody_and_is_named_when_its_component_is_asked_for(plugins, source, says):
    plugins("bad_plugin", source)
    plugins("good_plugin", GOOD)
    found = Registry.discover()
    assert found.names("predictor") == ["good"]
    with pytest.raises(PluginError, match="bad_plugin") as caught:
        found.get("predictor", "missing")
    assert says in str(caught.value)


def test_a_manifest_that_imports_torch_is_named(plugins, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    plugins("heavy_plugin", "import sys, types\nsys.modules['torch'] = types.ModuleType('torch')\n" + GOOD)
    with pytest.warns(UserWarning, match="'heavy_plugin' .* imports torch"):
        found = Registry.discover()
    assert found.torch_importers == ("heavy_plugin",)


def test_builtin_components_come_through_entry_points_of_this_package():
    packages = {package for _, package in Registry.discover().all("task")}
    assert packages == {"cvx"}
