"""layerzero: one process's results; parameters gathered inside a group, optimizer state over all ranks."""

import pytest

from tests.distributed.matrix import compare


@pytest.mark.parametrize("variant", ["1.0-t2v", "1.5-i2v"])
def test_alone(variant):
    compare(variant, [{"use": "layerzero", "zero3_size": 2}], world=4)
