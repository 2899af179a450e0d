"""Data axis: each strategy does what one process does."""

import pytest

from tests.distributed.matrix import compare


@pytest.mark.parametrize("variant", ["1.0-t2v", "1.5-i2v"])
@pytest.mark.parametrize("use", ["ddp", "zero2", "zero3"])
def test_alone(use, variant):
    compare(variant, [{"use": use}], world=2)
