"""The list of faults is true: each has a test that is there, and the page says what the list says."""

import ast
from functools import cache
from pathlib import Path

from tests.faults.table import AREAS, page, rows
from tests.faults.test_training import FAULTS

ROOT = Path(__file__).resolve().parents[2]


@cache
def functions(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_at_least_forty_faults_each_with_a_test_of_its_own():
    listed = list(rows())
    assert len(listed) >= 40
    assert len({row.fault for row in listed}) == len(listed)
    for row in listed:
        file, _, name = row.test.partition("::")
        assert name in functions(file), row
    assert set(AREAS) <= set(FAULTS)


def test_the_page_is_made_of_the_list():
    assert (ROOT / "docs/faults.md").read_text() == page()
