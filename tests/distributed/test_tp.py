"""Tensor parallel, with and without a shared sequence: alone and with data strategies."""

import pytest

from tests.distributed.matrix import compare


@pytest.mark.parametrize("variant", ["1.0-t2v", "1.5-i2v", "2b"])
@pytest.mark.parametrize("sequence", [False, True])
def test_alone(sequence, variant):
    compare(variant, [{"use": "tp", "size": 2, "sequence": sequence}], world=2)
