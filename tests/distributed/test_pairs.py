"""Every strategy alone, every pair that can be, and some triples do what one process does."""

import pytest

from tests.distributed.pairs import MARK, PAGE, cases, table, verify

CASES = list(cases())


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES, ids=lambda case: " x ".join(case.all))
def test_a_case_does_what_one_process_does(case):
    verify(case)


def test_the_page_shows_these_cases():
    shown = PAGE.read_text(encoding="utf-8").split(MARK)[1].strip()
    assert shown == table({case.names: str(case.world) for case in CASES}), (
        "run python -m tests.distributed.pairs"
    )
