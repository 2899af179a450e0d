"""The reader kit on every built-in reader."""

from __future__ import annotations

import pytest

from cvx_core.testing import plugin, reader

pytest.importorskip("decord", reason="decord is not installed on this platform")

test_plugin = plugin.suite("readers")
test_readers = reader.suite("pyav") + reader.suite("decord") + reader.suite("auto")
