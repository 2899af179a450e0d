"""LoRA under strategies: the same loss, gradients of the factors and updates as one process; the same files,
read and written; the same videos.
"""

from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from cvx_core import run
from cvx_io.tensors.dcp_metadata import read_checkpoint
from tests.distributed.harness import on_ranks
from tests.distributed.matrix import compare_all
from tests.distributed.test_sampling import TRAIN
from tests.distributed.test_train import run_all

LORA = {
    "use": "lora",
    "rank": 3,
    "alpha": 5,
    "targets": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.*", "proj"],
}
USUAL = {"use": "lora", "rank": 4}


def test_data_strategies():
    cases = [("1.0-t2v", [LORA, {"use": use}]) for use in ("ddp", "zero3", "zero1")]
    compare_all([*cases, ("1.5-i2v", [LORA, {"use": "zero3"}, {"use": "recompute"}])], world=2, layers=2)


def test_tensor_parallel():
    cases = [(variant, [LORA, {"use": "tp"}]) for variant in ("1.0-t2v", "1.5-i2v")]
    compare_all([*cases, ("1.0-t2v", [LORA, {"use": "tp", "sequence": True}])], world=2, layers=2)


def test_layerzero():
    compare_all([("1.0-t2v", [USUAL, {"use": "layerzero", "zero3_size": 2}])], world=4, layers=2)


ZERO3 = {"use": "zero3"}
TRAINED = {  # {name: strategies, whether base and LoRA are exported as one}
    "alone": ([], False),
    "alone-merged": ([], True),
    "pp": ([{"use": "pp", "stages": [1, 1]}, ZERO3], False),
    "tp": ([{"use": "tp", "size": 2}, ZERO3], False),
    "tp-merged": ([{"use": "tp", "size": 2}, {"use": "cp", "ulysses": 2}], True),
}
SAMPLED = {
    "alone": [],
    "tp": [{"use": "tp", "size": 2}, ZERO3],
    "cp": [{"use": "cfg-parallel"}, {"use": "cp", "ulysses": 2}],
}


def image_to_video(folder: Path) -> Path:
    """Write recipes that go on from a LoRA of an image-to-video model, and that sample with two of them."""
    base = yaml.safe_load(TRAIN) | {"output": str(folder / "base")}
    base["predictor"] |= {"image_condition": True}
    first = base | {"adapter": {"use": "lora", "rank": 3, "alpha": 5}, "output": str(folder / "first")}
    task = {"use": "train", "steps": 1, "trackers": [], "export": {"use": "diffusers-lora"}}
    first["task"] = task
    weights = {"use": "diffusers-lora", "path": str(folder / "first/adapter")}
    files = {"base": base, "first": first}
    for name, (parallel, merge) in TRAINED.items():
        export = {"export": {"use": "hf"}, "merge": True} if merge else {}
        shared = {"parallel": parallel, "loader": {"batch": 2 if ZERO3 not in parallel else 1}, "seed": 3}
        adapter = first["adapter"] | {"weights": weights}
        files[f"train-{name}"] = first | shared | {
            "adapter": adapter, "task": task | export, "output": str(folder / f"train-{name}"),
        }  # fmt: skip
    Image.new("RGB", (48, 32), (200, 60, 30)).save(folder / "first.png")
    for name, parallel in SAMPLED.items():
        files[f"sample-{name}"] = {
            "model": str(folder / "base/model"),
            "device": "cpu",
            "output": str(folder / f"sample-{name}"),
            "video": base["video"],
            "text_encoder": {"tokenizer": "bytes"},
            "dataset": {
                "use": "prompts",
                "prompts": ["a dot", "a ring"],
                "images": [str(folder / "first.png")] * 2,
            },
            "adapters": [
                {"use": "merged-lora", "scale": 0.5, "weights": weights},
                {"use": "merged-lora", "weights": weights | {"path": str(folder / "train-alone/adapter")}},
            ],
            "parallel": parallel,
            "task": {"use": "sample", "steps": 2, "guidance": 3.0, "save_latents": True},
        }
    for name, data in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors in a folder."""
    return {
        f"{file.name}: {name}": tensor
        for file in folder.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.slow
def test_files_and_videos_of_several_ranks_are_those_of_one(tmp_path):
    folder = image_to_video(tmp_path)
    alone = [[str(folder / f"{name}.yaml")] for name in ("base", "first", "train-alone", "train-alone-merged",
                                                         "sample-alone")]  # fmt: skip
    assert run_all(alone) == [0] * len(alone)
    together = ["train-pp", "train-tp", "train-tp-merged", "sample-tp", "sample-cp"]
    argvs = [[str(folder / f"{name}.yaml")] for name in together]
    assert on_ranks(4, run_all, argvs) == [[0] * len(argvs)] * 4
    for name in together:
        merged = "-merged" if name.endswith("merged") else ""
        part = "." if name.startswith("sample") else "model" if merged else "adapter"
        wanted = tensors(folder / f"{name.split('-')[0]}-alone{merged}" / part)
        found = tensors(folder / name / part)
        assert found.keys() == wanted.keys()
        assert found
        for key, value in wanted.items():
            torch.testing.assert_close(
                found[key], value, rtol=0, atol=1e-5, msg=lambda text, at=(name, key): f"{at}: {text}"
            )


@pytest.mark.slow
def test_a_lora_without_effect_ends_every_rank_after_saving(tmp_path):
    data = yaml.safe_load(TRAIN) | {"adapter": {"use": "lora", "rank": 2}, "parallel": [ZERO3]}
    data["optimizer"]["lr"] = 1e-30
    data["task"] = {"use": "train", "steps": 1, "trackers": []}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data | {"output": str(tmp_path / "out")}))
    assert on_ranks(2, run.main, [str(tmp_path / "r.yaml")]) == [2, 2]
    assert list((tmp_path / "out/checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_run_goes_on_from_trained_factors_alone_on_other_meshes(tmp_path):
    data = yaml.safe_load(TRAIN) | {"adapter": USUAL}
    data["task"] = {"use": "train", "steps": 3, "trackers": [], "export": {"use": "diffusers-lora"}}
    runs = {"alone": data | {"loader": {"batch": 2}, "output": str(tmp_path / "alone")}}
    links = {1: [{"use": "tp", "size": 2}, ZERO3], 2: [{"use": "pp", "stages": [1, 1]}, ZERO3], 3: []}
    for last, parallel in links.items():
        task = data["task"] | {"resume": "auto", "stop_at": last}
        batch = {"loader": {"batch": 2 // (2 if parallel else 1)}}
        out = {"output": str(tmp_path / "chain")}
        runs[f"chain-{last}"] = data | batch | out | {"parallel": parallel, "task": task}
    for name, recipe in runs.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    argvs = [[str(tmp_path / f"{name}.yaml")] for name in runs]
    assert on_ranks(4, run_all, argvs[1:3]) == [[0, 0]] * 4
    assert run_all([argvs[0], argvs[3]]) == [0, 0]
    held = read_checkpoint(tmp_path / "chain/checkpoints/step-00000002").tensors
    assert held
    assert all("lora_" in name for name in held)
    wanted, found = tensors(tmp_path / "alone/adapter"), tensors(tmp_path / "chain/adapter")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)
