"""Several buckets on two ranks, beside one process: the same rows at the same step, the same losses."""

import json
from pathlib import Path

import pytest

from cvx_core import run
from tests.distributed.harness import on_ranks
from tests.distributed.test_train import RECIPE, run_all

HOW = {
    "ddp": ("parallel=[{use: ddp}]", 1),
    "cp": ("parallel=[{use: cp, ulysses: 2}]", 2),
    "pp": ("parallel=[{use: pp, size: 2, microbatches: 2}]", 2),
    "encoder-dp": ("parallel=[{use: cp, ulysses: 2}, {use: encoder-dp}, {use: vae-cp}]", 2),
    "rest": ("parallel=[{use: ddp}]", 1),
}


def argv(folder: Path, out: str, batch: int, *settings: str) -> list[str]:
    buckets = f"{{48x64: {{9: [0.5, {batch}]}}, 32x48: {{5: [0.8, {2 * batch}]}}}}"
    items = (
        f"output={folder / out}",
        "video={fps: 8}",
        f"loader={{buckets: {buckets}, max_drop: 0.5}}",
        "dataset.rows=24",
        "task.export=null",
        *settings,
    )
    return [str(folder / "r.yaml"), *(f"--set={item}" for item in items)]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("buckets")
    (folder / "r.yaml").write_text(RECIPE)
    runs = [
        argv(folder, out, batch, how, "task.stop_at=2") for out, (how, batch) in HOW.items() if out == "rest"
    ]
    runs += [argv(folder, "rest", 1, HOW["rest"][0], "task.resume=auto")]
    runs += [argv(folder, out, batch, how) for out, (how, batch) in HOW.items() if out != "rest"]
    assert on_ranks(2, run_all, runs) == [[0] * len(runs)] * 2
    assert run.main(argv(folder, "one", 2)) == 0
    return folder


@pytest.mark.parametrize("how", HOW)
def test_two_ranks_train_on_buckets_as_one_process_does(folder, how):
    ours, alone = lines(folder / how), lines(folder / "one")
    assert [line["rows"] for line in ours] == [line["rows"] for line in alone]
    assert len({len(line["rows"]) for line in ours}) > 1, "batches of several buckets"
    for mine, other in zip(ours, alone, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
