"""Evaluating on several ranks, or in other batches: the figures of one process, written once."""

import json
from pathlib import Path

import pytest
import yaml

from cvx_core import RecipeError, run
from cvx_core.recipe import parse
from cvx_core.spec import resolve
from tests.distributed.harness import on_ranks
from tests.distributed.test_sampling import TRAIN
from tests.distributed.test_train import run_all

ON_2 = {
    "ddp": [{"use": "ddp"}],
    "zero3": [{"use": "zero3"}],
    "tp": [{"use": "tp"}, {"use": "encoder-dp"}],
    "cp": [{"use": "cp", "ring": 2}, {"use": "vae-cp"}],
}
BATCHES = {"alone": 2, "one-by-one": 1, "together": 5}
ROWS = 5


def argv(folder: Path, name: str, batch: int, parallel: list[dict]) -> list[str]:
    content = {
        "model": str(folder / "model"),
        "device": "cpu",
        "output": str(folder / name),
        "video": {"frames": 17, "height": 32, "width": 48, "fps": 8},
        "dataset": {"use": "synthetic", "rows": 7},
        "loader": {"batch": batch},
        "text_encoder": {"tokenizer": "bytes"},
        "parallel": parallel,
        "task": {"use": "evaluate", "bands": 2, "draws": 2, "rows": ROWS},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return [str(path)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "r.yaml").write_text(TRAIN)
    assert run.main([str(folder / "r.yaml"), f"--set=output={folder}"]) == 0
    for name, batch in BATCHES.items():
        assert run.main(argv(folder, name, batch, [])) == 0
    runs = [argv(folder, name, 2, parallel) for name, parallel in ON_2.items()]
    assert on_ranks(2, run_all, runs) == [[0] * len(runs)] * 2
    return folder


@pytest.mark.parametrize("name", [*ON_2, *list(BATCHES)[1:]])
def test_the_figures_are_those_of_one_process(folder, name):
    mine, alone = (json.loads((folder / n / "evaluation.json").read_text()) for n in (name, "alone"))
    assert mine["rows"] == alone["rows"] == ROWS
    assert mine["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert mine["psnr"] == pytest.approx(alone["psnr"], rel=1e-5)
    assert [band["loss"] for band in mine["bands"]] == pytest.approx(
        [band["loss"] for band in alone["bands"]], rel=1e-5
    )


def test_a_pipeline_is_refused(folder):
    text = Path(argv(folder, "pp", 1, [{"use": "pp"}])[0]).read_text()
    with pytest.raises(RecipeError, match=r"training step of a predictor, which task 'evaluate' has not"):
        resolve(parse(text))
