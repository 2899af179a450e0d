"""loader.unreadable: skip on two ranks: they share the decoding, and train on the rows of one process."""

import json

import pytest
import yaml

from cvx_core import run
from tests.distributed.harness import on_ranks
from tests.distributed.test_train import RECIPE, lines, run_all
from tests.faults.clips import damage, list_clips
from tests.io.test_inspection import write_clip

GOOD = ("a", "b", "c", "d")


@pytest.mark.slow
def test_two_ranks_leave_out_the_same_clips_as_one_process(tmp_path):
    for name in GOOD:
        write_clip(tmp_path / f"{name}.mp4", 9, (32, 48))
    damage(write_clip(tmp_path / "damaged.mp4", 12, (32, 48)))
    (tmp_path / "empty.mp4").touch()
    list_clips(tmp_path, [f"{name}.mp4" for name in ("a", "damaged", "b", "empty", "c", "d")])
    recipe = yaml.safe_load(RECIPE) | {"dataset": {"use": "jsonl", "path": "clips.jsonl"}}
    recipe["task"] |= {"export": None, "steps": 4}
    recipe["loader"] = {"unreadable": "skip", "max_drop": 0.5}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))

    def argv(out, *settings):
        return [
            str(tmp_path / "r.yaml"),
            *(f"--set={item}" for item in (f"output={tmp_path / out}", *settings)),
        ]

    ddp = "parallel=[{use: ddp}]"
    runs = [argv("two", ddp, "task.stop_at=2"), argv("two", ddp, "task.resume=auto")]
    assert on_ranks(2, run_all, runs) == [[0, 0]] * 2
    assert run.main(argv("one", "loader.batch=2")) == 0
    accounts = [json.loads((tmp_path / out / "data.json").read_text()) for out in ("two", "one")]
    assert accounts[0]["clips"] == accounts[1]["clips"]
    assert accounts[0]["reasons"] == {"unreadable": 2}
    ours, alone = lines(tmp_path / "two"), lines(tmp_path / "one")
    assert [line["rows"] for line in ours] == [line["rows"] for line in alone]
    assert {row for line in ours for row in line["rows"]} == set(GOOD)
    known = [json.loads((tmp_path / out / "readable.json").read_text()) for out in ("two", "one")]
    assert known[0] == known[1]
