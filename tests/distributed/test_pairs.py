"""Every strategy alone, every pair that can be, and some triples do what one process does.

When all of them have been run, what they gave is written into docs/parallel.md.
"""

from collections.abc import Iterator

import pytest

from tests.distributed.pairs import MARK, PAGE, cases, table, verify, write

CASES = list(cases())


@pytest.fixture(scope="module")
def results() -> Iterator[dict[tuple[str, ...], str]]:
    """What each case gave: the world it was run on, or "no"."""
    found: dict[tuple[str, ...], str] = {}
    yield found
    if len(found) == len(CASES):
        write(found)


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES, ids=lambda case: " x ".join(case.all))
def test_a_case_does_what_one_process_does(case, results):
    results[case.names] = "no"
    verify(case)
    results[case.names] = str(case.world)


def test_the_page_shows_these_cases():
    shown = PAGE.read_text(encoding="utf-8").split(MARK)[1].strip()
    assert shown == table({case.names: str(case.world) for case in CASES}), "run make matrix"
