"""The author's whole test file."""

from cvx_core.testing import plugin, strategy

test_all = plugin.suite("acme-hsdp") + strategy.suite("acme-hsdp", world=4, shards=2)
