"""Saving beside the steps: the state as it was is written, a failure is heard of, nothing overlaps."""

import threading

import pytest
import torch

from cvx_core.mesh import Degrees, Mesh
from cvx_io import resume
from cvx_io.saver import Saver

MESH = Mesh(Degrees())


def saved(folder, beside: bool) -> dict[int, torch.Tensor]:
    """Save a tensor that changes after each save; return what the checkpoints hold, by step."""
    weight = torch.zeros(3)
    with Saver(folder, 9, MESH, beside) as saver:
        for step in (1, 2, 3):
            weight += 1
            saver.save(step, {"model": {"w": weight}, "note": step}, {"step": step})
        weight += 1
    result = {}
    for path in resume.complete(folder):
        state = {"model": {"w": torch.empty(3)}, "note": 0}
        resume.restore(path, state)
        result[state["note"]] = state["model"]["w"]
    return result


@pytest.mark.parametrize("beside", [False, True])
def test_holds_the_state_of_its_step_whatever_happens_to_it_later(beside, tmp_path):
    values = saved(tmp_path, beside)
    assert {step: value.tolist() for step, value in values.items()} == {n: [n] * 3 for n in (1.0, 2.0, 3.0)}


def test_steps_go_on_while_it_writes_and_the_next_save_waits(tmp_path, monkeypatch):
    may_write, order = threading.Event(), []
    write = resume.save

    def slow(folder, step, *args):
        may_write.wait(10)
        order.append(step)
        return write(folder, step, *args)

    monkeypatch.setattr(resume, "save", slow)
    with Saver(tmp_path, 9, MESH, True) as saver:
        saver.save(1, {"w": torch.zeros(1)}, {})
        assert order == []
        may_write.set()
        saver.save(2, {"w": torch.zeros(1)}, {})
        assert order[0] == 1
    assert order == [1, 2]
    assert len(resume.complete(tmp_path)) == 2


def test_what_goes_wrong_beside_the_steps_is_raised_there(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "save", fails)
    with pytest.raises(OSError, match="No space left"), Saver(tmp_path, 1, MESH, True) as saver:
        saver.save(1, {"w": torch.zeros(1)}, {})
    with Saver(tmp_path, 1, MESH, True) as saver:
        saver.save(1, {"w": torch.zeros(1)}, {})
        with pytest.raises(OSError, match="No space left"):
            saver.save(2, {"w": torch.zeros(1)}, {})
        saver.check()


def test_another_error_of_the_run_is_the_one_raised_and_the_save_is_complete(tmp_path):
    def fail():
        with Saver(tmp_path, 1, MESH, True) as saver:
            saver.save(1, {"w": torch.zeros(1)}, {})
            raise ValueError("of the run")

    with pytest.raises(ValueError, match="of the run"):
        fail()
    assert [path.name for path in resume.complete(tmp_path)] == ["step-00000001"]
