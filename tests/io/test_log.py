"""The run's log: one line per step, and cut back to the step a run is resumed from."""

import json

from cvx_io.log import RunLog


def lines(folder, name="log"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_exact_values_and_timings_go_to_different_files(tmp_path):
    log = RunLog(tmp_path, 0)
    log.write(1, {"loss": 0.5, "rows": ["a"]}, {"seconds": 2.0})
    log.write(1, {"other": 1})
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5, "rows": ["a"]}, {"step": 1, "other": 1}]
    assert lines(tmp_path, "speed") == [{"step": 1, "seconds": 2.0}]


def test_a_resumed_log_drops_what_came_after_and_what_was_cut_off(tmp_path):
    log = RunLog(tmp_path, 0)
    for step in range(6):
        log.write(step, {"loss": step}, {})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    RunLog(tmp_path, 3).write(4, {"loss": 40}, {})
    assert [line["loss"] for line in lines(tmp_path)] == [0, 1, 2, 3, 40]


def test_a_run_from_the_start_keeps_nothing_of_another_in_its_folder(tmp_path):
    RunLog(tmp_path, 0).write(0, {"loss": 1}, {})
    RunLog(tmp_path, 0).write(0, {"loss": 2}, {})
    assert [line["loss"] for line in lines(tmp_path)] == [2]
