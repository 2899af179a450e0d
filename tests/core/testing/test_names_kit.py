"""The names kit passes on a bijective table, and fails on tables that lose, mix up or misplace tensors."""

import pytest

from cvx_core import FormatError
from cvx_core.testing import names
from cvx_io.rename import Cat, Chunks, Drop, Names, Rename

SHAPES = {f"b.{i}.{x}": (4, 3) for i in range(2) for x in "qkv"} | {"norm.bias": (5,), "scalar": ()}
QKV = Cat("f.{i}.qkv", ["b.{i}.q", "b.{i}.k", "b.{i}.v"])
REST = Rename("f.{rest}", "{rest}")


class Discovered:
    """A registry that knows one table."""

    def __init__(self, table):
        self.table = table

    def discover(self):
        return self

    def get(self, kind, name):
        return self

    def load(self):
        return self.table


@pytest.fixture
def checks(monkeypatch):
    """Return the kit's checks for a table."""

    def make(table):
        monkeypatch.setattr(names, "Registry", Discovered(table))
        return names.suite("x:y", SHAPES).checks

    return make


def test_a_bijective_table_passes(checks):
    for check in checks(Names((QKV, REST), prefix="model.")).values():
        check()


class ReadsBackwards(Names):
    """Joins in another order than it cuts."""

    def write(self, tensors, where=""):
        return Names((Cat("f.{i}.qkv", ["b.{i}.v", "b.{i}.k", "b.{i}.q"]), REST)).write(tensors)


@pytest.mark.parametrize(
    "table",
    [
        Names((QKV,)),
        Names((Drop("f.norm.{p}", "lost"), QKV, REST)),
        Names((QKV, Rename("f.{p}", "{p}"), Rename("f.scalar", "norm.bias"))),
        Names((Chunks("f.{i}.qk", 3, {"b.{i}.q": (0, 1), "b.{i}.k": (2,)}), REST)),
        ReadsBackwards((QKV, REST)),
    ],
    ids=["incomplete", "loses", "collides", "uneven", "mixes-up"],
)
def test_a_faulty_table_fails(checks, table):
    failures = 0
    for check in checks(table).values():
        try:
            check()
        except (AssertionError, FormatError):
            failures += 1
    assert failures >= 2
