"""Exports straight from shards, pipeline stages included, hold what one process exports, in every format."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cvx_core import run
from cvx_io.conversion import Request, prepare
from tests.distributed.harness import on_ranks
from tests.distributed.test_train import RECIPE, run_all

SHARED = {
    "pp-zero3": ("[{use: pp, stages: [1, 1]}, {use: zero3}]", "loader.batch=2"),
    "pp-tp": ("[{use: tp}, {use: pp, stages: [1, 1], schedule: gpipe}]", "loader.batch=4"),
}
FORMATS = {"hf": "{use: hf}", "sat": "{use: sat}", "megatron": "{use: megatron, tp: 2}", "dcp": "{use: dcp}"}


def exported(folder: Path, to: str) -> dict[str, torch.Tensor]:
    """Return what a run has exported, under the names of hf."""
    model = folder / "model" if to != "hf" else folder / "model" / "transformer"
    if to != "hf":
        told = {"positions": "rotary"} if to == "megatron" else {}  # such files do not tell
        prepare(Request(model, folder / "hf", "hf", model_settings=told)).run(False)
        model = folder / "hf"
    [file] = model.rglob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    (folder / "r.yaml").write_text(RECIPE)

    def argv(out: str, to: str, *settings: str) -> list[str]:
        all_ = (f"output={folder / out}", f"task.export={FORMATS[to]}", "task.steps=1", *settings)
        return [str(folder / "r.yaml"), *(f"--set={item}" for item in all_)]

    assert run.main(argv("alone", "hf", "loader.batch=4")) == 0
    runs = [
        argv(f"{name}-{to}", to, f"parallel={parallel}", batch)
        for name, (parallel, batch) in SHARED.items()
        for to in FORMATS
    ]
    assert on_ranks(4, run_all, runs) == [[0] * len(runs)] * 4
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", SHARED)
def test_an_export_from_shards_is_that_of_one_process(name, to, folder):
    mine, alone = exported(folder / f"{name}-{to}", to), exported(folder / "alone", "hf")
    assert mine.keys() == alone.keys()
    for key, value in alone.items():
        torch.testing.assert_close(
            mine[key], value, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
