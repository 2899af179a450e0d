"""Suites of conformance checks, as pytest sees them."""

from __future__ import annotations

import pytest

from cvx_core.testing import Suite

pytest_plugins = ["pytester"]

KIT = """
from cvx_core.testing import Suite

def good(): pass
def writes(tmp_path): (tmp_path / "file").write_text("x")
def bad(): assert 1 == 2

test_all = Suite.of("one", good, writes) + Suite.of("two", good, bad)
"""


def test_a_suite_is_collected_as_one_test_per_check(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_kit=KIT)
    result = pytester.runpytest("-v")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*test_all?one.writes? PASSED*", "*test_all?two.bad? FAILED*"])


def test_the_same_check_twice_is_an_error() -> None:
    def good() -> None: ...

    with pytest.raises(ValueError, match=r"one\.good"):
        Suite.of("one", good) + Suite.of("one", good)
