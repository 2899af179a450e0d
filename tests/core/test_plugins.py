"""Every built-in plugin passes the kit that third parties run."""

from importlib.metadata import entry_points

from cvx_core.testing import Suite, plugin

OURS = sorted(point.name for point in entry_points(group="cvx") if point.value.startswith("cvx_plugins."))

test_all = sum((plugin.suite(name) for name in OURS), Suite({}))
