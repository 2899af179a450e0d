"""Faults of sampling and precomputing: an error in words, and what was complete is not made again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from cvx_core import CvxError
from cvx_core.recipe import parse
from cvx_core.run import run
from cvx_core.spec import resolve
from cvx_io.cache.items import items_in
from cvx_plugins.tasks import sample
from tests.conversion.test_fault_permissions import bound_by_permissions
from tests.faults.test_training import full_disk
from tests.io.test_inspection import write_clip
from tests.plugins.tasks.conftest import TINY

Recipe = dict[str, Any]


def launch(folder: Path, recipe: Recipe, **task: Any) -> Path:
    data = {**recipe, "task": {**recipe["task"], **task}}
    run(resolve(parse(yaml.safe_dump(data), base=folder)))
    return Path(recipe["output"])


def digests(paths: list[Path]) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and two clips."""
    folder = tmp_path_factory.mktemp("base")
    tiny = yaml.safe_load(TINY)
    tiny["output"] = str(folder / "trained")
    launch(folder, tiny, steps=1, export={"use": "hf"}, export_whole=True)
    for name in "ab":
        write_clip(folder / f"{name}.mp4", 9, (32, 48))
    rows = [{"file": f"{name}.mp4", "captions": name, "id": name} for name in "ab"]
    (folder / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def recipe_of(base: Path, output: Path, task: Recipe, **more: Any) -> Recipe:
    tiny = yaml.safe_load(TINY)
    return {
        "model": str(base / "trained/model"),
        "device": "cpu",
        "output": str(output),
        "video": tiny["video"],
        "text_encoder": {"tokenizer": "bytes"},
        "task": task,
        **more,
    }


@pytest.fixture
def sampling(base: Path, tmp_path: Path) -> Recipe:
    task = {"use": "sample", "steps": 2, "guidance": 1.0}
    data = {"use": "prompts", "prompts": ["one name", "One name!"]}
    return recipe_of(base, tmp_path / "out", task, dataset=data)


def test_two_prompts_of_one_name_give_two_videos(base: Path, sampling: Recipe) -> None:
    out = launch(base, sampling)
    assert sorted(path.name for path in out.glob("*.mp4")) == ["0000-one-name.mp4", "0001-one-name.mp4"]


def test_a_disk_that_fills_while_sampling_keeps_the_videos_before(
    base: Path, sampling: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", sample.write_mp4

    def write(path: Path, *rest: Any) -> None:
        with full_disk(20 if path.name.startswith("0001") else 10**9):
            real(path, *rest)

    monkeypatch.setattr(sample, "write_mp4", write)
    with pytest.raises(CvxError, match=r"File too large\. Make room there.*kept"):
        launch(base, sampling)
    monkeypatch.setattr(sample, "write_mp4", real)
    before = digests(sorted(out.glob("0000*")))
    assert len(before) == 2
    assert not list(out.glob("*0001*"))
    launch(base, sampling)
    assert digests(sorted(out.glob("0000*"))) == before
    assert (out / "0001-one-name.mp4").exists()


def test_an_output_that_may_not_be_written(base: Path, sampling: Recipe, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    sampling["output"] = str(tmp_path / "closed/out")
    with bound_by_permissions(), pytest.raises(CvxError, match=r"closed.*Permission denied\. Allow writing"):
        launch(base, sampling)
    (tmp_path / "file").touch()
    sampling["output"] = str(tmp_path / "file")
    with pytest.raises(CvxError, match=r"file.*A file is where a folder has to be"):
        launch(base, sampling)


@pytest.mark.parametrize(
    ("part", "tensor", "says"),
    [
        ("transformer", "proj_out.bias", "no longer finite after step 1 of 2"),
        ("vae", "decoder.conv_out.conv.bias", "values that are NaN or infinite"),
    ],
)
def test_values_that_are_not_finite_become_no_video(
    part: str, tensor: str, says: str, base: Path, sampling: Recipe, tmp_path: Path
) -> None:
    [file] = (base / "trained/model" / part).glob("*.safetensors")
    tensors = load_file(file)
    tensors[tensor] = tensors[tensor] * float("nan")
    (tmp_path / part).mkdir()
    (tmp_path / part / "config.json").write_text((file.parent / "config.json").read_text())
    save_file(tensors, tmp_path / part / file.name)
    section = {"transformer": "predictor", "vae": "autoencoder"}[part]
    sampling[section] = {"weights": {"use": "hf", "path": str(tmp_path / part)}}
    with pytest.raises(CvxError, match=says):
        launch(base, sampling)
    assert not list((tmp_path / "out").glob("*.mp4"))


@pytest.fixture
def caching(base: Path, tmp_path: Path) -> Recipe:
    data = {"use": "jsonl", "path": "clips.jsonl"}
    return recipe_of(base, tmp_path / "cache", {"use": "precompute"}, dataset=data)


def test_a_disk_that_fills_while_precomputing_keeps_the_items_before(base: Path, caching: Recipe) -> None:
    rows = (base / "clips.jsonl").read_text().splitlines()
    (base / "one.jsonl").write_text(rows[0])
    out = launch(base, {**caching, "dataset": {"use": "jsonl", "path": "one.jsonl"}})
    before = digests([path for _, path in items_in(out)])
    with (
        full_disk(200),
        pytest.raises(CvxError, match=r"File too large.*All other items are kept; make room"),
    ):
        launch(base, caching)
    assert digests([path for _, path in items_in(out)]) == before
    launch(base, caching)
    assert before.items() <= digests([path for _, path in items_in(out)]).items()
    assert json.loads((out / "precompute.json").read_text())["rows"] == 2


@pytest.mark.parametrize("fault", ["cut", "absent", "NaN"])
def test_a_damaged_item_ends_training_from_the_cache_with_what_to_run(
    fault: str, base: Path, caching: Recipe, tmp_path: Path
) -> None:
    out = launch(base, caching)
    latents = [path for kind, path in items_in(out) if kind == "latent"]
    for path in latents:
        if fault == "cut":
            path.write_bytes(path.read_bytes()[:-9])
        elif fault == "absent":
            path.unlink()
        else:
            tensors = load_file(path)
            save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, path)
    training = recipe_of(
        base,
        tmp_path / "tuned",
        {"use": "train", "steps": 2},
        dataset={"use": "feature-cache", "path": str(out)},
        loader={"batch": 1},
    )
    says = "it comes with the batch: latent of its rows" if fault == "NaN" else r"[Rr]un precompute again"
    with pytest.raises(CvxError, match=says):
        launch(base, training)
    assert len([path for kind, path in items_in(out) if kind == "text"]) == 3
    assert not (tmp_path / "tuned/checkpoints").exists()
