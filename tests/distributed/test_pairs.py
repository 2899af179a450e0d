"""Every strategy alone, every pair that can be, and some triples do what one process does."""

import pytest

from tests.distributed.pairs import cases, verify

CASES = list(cases())


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES, ids=lambda case: " x ".join(case.all))
def test_a_case_does_what_one_process_does(case):
    verify(case)
