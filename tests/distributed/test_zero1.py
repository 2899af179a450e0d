"""zero1: one process's results."""

import pytest

from tests.distributed.matrix import compare


@pytest.mark.parametrize("variant", ["1.0-t2v", "1.5-i2v"])
def test_alone(variant):
    compare(variant, [{"use": "zero1"}], world=2)
