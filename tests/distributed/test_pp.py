"""Pipeline: stages on several ranks do what one process does."""

import pytest

from tests.distributed.matrix import compare


@pytest.mark.parametrize("variant", ["1.0-t2v", "1.5-i2v"])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zero-bubble"])
def test_alone(schedule, variant):
    compare(variant, [{"use": "pp", "schedule": schedule}], world=2)
