"""Full collections leave out what a long run keeps, and only while it lasts."""

import gc

import pytest

from cvx_core.collecting import SETTLED, Collecting


@pytest.fixture(autouse=True)
def nothing_frozen():
    assert gc.get_freeze_count() == 0
    yield
    gc.unfreeze()


def test_what_the_first_steps_made_is_left_out_until_the_end():
    with Collecting() as collecting:
        for _ in range(SETTLED - 1):
            collecting.step()
        assert gc.get_freeze_count() == 0
        collecting.step()
        assert gc.get_freeze_count() > 1000
        collecting.step()
    assert gc.get_freeze_count() == 0


def test_what_a_caller_left_out_stays_left_out():
    gc.freeze()
    with Collecting() as collecting:
        for _ in range(SETTLED):
            collecting.step()
    assert gc.get_freeze_count() > 0
