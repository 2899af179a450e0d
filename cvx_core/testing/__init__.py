"""Conformance kits: what a component of each kind must satisfy, as tests a plugin's author runs on it.

A test file lists the names it runs, and nothing else:

    from cvx_core.testing import names, predictor

    test_all = predictor.suite("acme-wavedit", num_layers=2) + names.suite("acme-wavedit:hf")

Every kit offers `suite(name, **fields) -> Suite`; `fields` go to the component's config on top of its preset.
A kit states its checks as plain functions that raise AssertionError; they may take pytest fixtures by name:

    def suite(name: str, **fields: Any) -> Suite:
        def writes_what_it_reads(tmp_path: Path) -> None: ...

        return Suite.of(name, finite, writes_what_it_reads)

This is the only part of the core that imports pytest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest

Check = Callable[..., None]


def _run(check: Check, request: pytest.FixtureRequest) -> None:
    check(**{name: request.getfixturevalue(name) for name in inspect.signature(check).parameters})


class Suite:
    """Named checks that pytest collects as one parametrised test; suites add up.

    pytest takes any callable for a test whose `__wrapped__` is a function, and reads its marks from
    `pytestmark`; that is all the machinery there is.
    """

    __wrapped__ = staticmethod(_run)

    def __init__(self, checks: Mapping[str, Check]):
        """Take checks by id; an id is what pytest prints and what `-k` selects."""
        self.checks = dict(checks)
        params = [pytest.param(check, id=name) for name, check in self.checks.items()]
        self.pytestmark = [pytest.mark.parametrize("check", params).mark]

    @classmethod
    def of(cls, name: str, *checks: Check) -> Suite:
        """Make a suite of functions; each one's id is `<component name>.<function name>`."""
        return cls({f"{name}.{check.__name__}": check for check in checks})

    def __add__(self, other: Suite) -> Suite:
        """Return both suites as one. Raises ValueError where an id occurs in both."""
        twice = self.checks.keys() & other.checks.keys()
        if twice:
            raise ValueError(f"checks {sorted(twice)} are in both suites; run each component once per test")
        return Suite({**self.checks, **other.checks})

    def __call__(self, check: Check, request: Any) -> None:
        """Run one check with the fixtures it asks for."""
        _run(check, request)
