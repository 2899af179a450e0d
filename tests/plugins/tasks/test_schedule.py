"""Learning-rate schedules: where they start, turn and end."""

import pytest

from cvx_plugins.tasks import LoopConfig
from cvx_plugins.tasks.schedule import lr_scale

SCHEDULES = ("constant", "linear", "cosine", "cosine-restarts", "polynomial")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_warm_up_rises_to_the_full_rate(schedule):
    config = LoopConfig(steps=100, warmup=4, schedule=schedule)
    assert [lr_scale(step, config) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
def test_a_decay_ends_at_the_final_rate(schedule):
    config = LoopConfig(steps=1000, schedule=schedule, final_lr=0.1)
    values = [lr_scale(step, config) for step in range(1000)]
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(0.1, abs=2e-3)
    assert values == sorted(values, reverse=True)


def test_the_shapes_differ_half_way():
    half = {s: lr_scale(50, LoopConfig(steps=100, schedule=s, power=2.0)) for s in SCHEDULES}
    assert half == pytest.approx(
        {"constant": 1.0, "linear": 0.5, "cosine": 0.5, "cosine-restarts": 0.5, "polynomial": 0.25}
    )
    assert lr_scale(25, LoopConfig(steps=100, schedule="cosine")) > 0.8


def test_restarts_come_back_to_the_full_rate():
    config = LoopConfig(steps=90, schedule="cosine-restarts", restarts=3)
    assert [lr_scale(step, config) for step in (0, 30, 60)] == pytest.approx([1.0, 1.0, 1.0])
    assert lr_scale(29, config) < 0.01
