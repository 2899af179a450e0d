"""Two ranks fill one feature cache, each a share of it; two ranks train from it as from the clips."""

import json

import yaml

from cvx_core import run
from tests.distributed.harness import on_ranks
from tests.distributed.test_train import RECIPE


def run_all(argvs: list[list[str]]) -> list[int]:
    return [run.main(argv) for argv in argvs]


def test_ranks_share_the_items_and_train_from_them(tmp_path):
    online = yaml.safe_load(RECIPE) | {"parallel": [{"use": "ddp"}], "output": str(tmp_path / "online")}
    online["task"].pop("export")
    made = {k: v for k, v in online.items() if k != "optimizer"}
    made |= {"task": {"use": "precompute"}, "output": str(tmp_path / "cache")}
    dataset = {"use": "feature-cache", "path": str(tmp_path / "cache")}
    cached = online | {"dataset": dataset, "output": str(tmp_path / "cached")}
    (tmp_path / "cache").mkdir()
    argvs = []
    for name, data in (("made", made), ("cached", cached), ("online", online)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(data))
        argvs.append([str(tmp_path / f"{name}.yaml")])
    assert on_ranks(2, run_all, argvs) == [[0] * 3] * 2
    account = json.loads((tmp_path / "cache/precompute.json").read_text())
    assert account["encoded"] == {"latent": 9, "text": 10}
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("cached", "online")]
    assert logs[0] == logs[1]
