"""The train task on two ranks: what it logs, saves, exports and goes on from, beside one process."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cvx_core import CvxError, run
from cvx_core.recipe import load
from cvx_core.spec import resolve
from cvx_plugins.tasks import loop
from tests.distributed.harness import on_ranks

RECIPE = """
device: cpu
video: {frames: 9, height: 32, width: 48, fps: 8}
predictor:
  use: cogvideox
  num_layers: 2
  num_heads: 2
  head_dim: 16
  latent_channels: 4
  text_dim: 32
  text_length: 16
  temb_dim: 32
text_encoder: {use: t5, num_layers: 1, dim: 32, num_heads: 2, tokenizer: bytes}
autoencoder: {use: cogvideox-vae, latent_channels: 4, base_channels: 4, blocks_per_level: 1}
dataset: {use: synthetic, rows: 9}
optimizer: {use: adamw, lr: 1e-3}
task: {use: train, steps: 4, trackers: [], export: {use: hf}}
"""


def run_all(argvs: list[list[str]]) -> list[int]:
    """Run recipes one after the other; returns their exit codes."""
    return [run.main(argv) for argv in argvs]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors")


RUNS = {
    "ddp": [("ddp", "task.steps=4")],
    "zero3": [("zero3", "task.steps=4")],
    "parts": [("zero3", "task.stop_at=2"), ("zero3", "task.resume=auto")],
    "one-zero3": [("zero3", "task.resume=auto")],
    "ddp-one": [("ddp", "task.stop_at=2")],
}
EXPORTS = {"dcp": "{use: dcp}", "sat": "{use: sat}", "megatron": "{use: megatron, tp: 2}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two ranks make of a recipe, by strategy, and `one` process with batches of two rows."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "r.yaml").write_text(RECIPE)

    def argv(out: str, *settings: str) -> list[str]:
        return [str(folder / "r.yaml"), *(f"--set={item}" for item in (f"output={folder / out}", *settings))]

    batch = "loader.batch=2"
    assert run.main(argv("one", batch)) == 0
    assert run.main(argv("one-zero3", batch, "task.stop_at=2")) == 0
    runs = [
        argv(out, f"parallel=[{{use: {use}}}]", *rest) for out, each in RUNS.items() for use, *rest in each
    ]
    zero3 = "parallel=[{use: zero3}]"
    runs += [argv(name, zero3, "task.steps=1", f"task.export={value}") for name, value in EXPORTS.items()]
    assert on_ranks(2, run_all, runs) == [[0] * len(runs)] * 2
    assert run.main(argv("ddp-one", batch, "task.resume=auto")) == 0
    for name in EXPORTS:
        source = f"predictor.weights={{use: {name}, path: {folder / name / 'model'}}}"
        assert run.main(argv(f"{name}-again", source, batch, "task.stop_at=1", "task.export=null")) == 0
    return folder


@pytest.mark.parametrize("how", ["ddp", "zero3", "one-zero3", "ddp-one"])
def test_two_ranks_train_as_one_process_with_their_rows(folder, how):
    """Also where one goes on from what the other has saved: the data goes on where it was."""
    ours, alone = lines(folder / how), lines(folder / "one")
    assert [line["rows"] for line in ours] == [line["rows"] for line in alone]
    for mine, other in zip(ours, alone, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    exported, expected = weights(folder / how), weights(folder / "one")
    assert exported.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(exported[name], value, rtol=0, atol=1e-4)
    assert "step-00000004" in [path.name for path in (folder / how / "checkpoints").iterdir()]


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(folder):
    assert lines(folder / "parts") == lines(folder / "zero3")
    whole, parts = weights(folder / "zero3"), weights(folder / "parts")
    for name, value in whole.items():
        assert torch.equal(parts[name], value), name


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_in_other_formats_hold_every_parameter(folder, name):
    """They load: the loss of the first step is that of a model which was trained for one step."""
    [again] = lines(folder / f"{name}-again")
    alone = lines(folder / "one")
    assert again["rows"] == alone[0]["rows"]
    assert again["loss"] < alone[0]["loss"]


BROKEN = "transformer_blocks.1.ff.net.2"


def run_broken(argv: list[str]) -> str:
    """Run a recipe whose step 2 has NaN from a module on the last rank; return what the run ended with."""
    real = loop.Loop._accumulate

    def accumulate(self, stream, step, *rest):
        part = self._module.get_submodule(BROKEN)
        on = step == 1 and self._mesh.rank == 1
        handle = part.register_forward_hook(lambda _m, _args, out: out * float("nan") if on else out)
        try:
            return real(self, stream, step, *rest)
        finally:
            handle.remove()

    loop.Loop._accumulate = accumulate
    try:
        run.run(resolve(load(argv[0], argv[1:]), world=2))
    except CvxError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("policy", "strategy"), [("stop", "zero3"), ("skip", "ddp")])
def test_ranks_take_the_same_decision_on_a_batch_of_one_of_them(policy, strategy, tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    settings = [f"output={tmp_path}/out", f"task.non_finite={policy}", f"parallel=[{{use: {strategy}}}]"]
    ends = on_ranks(2, run_broken, [str(tmp_path / "r.yaml"), *settings])
    assert ends[0] == ends[1]
    if policy == "stop":
        text = rf"step 2: the loss is nan: it begins in '{BROKEN}'\. Rows: \S+ \(timestep \d+\)\. Nothing"
        assert re.match(text, ends[0])
    else:
        assert ["skipped" in line for line in lines(tmp_path / "out")] == [False, True, False, False]


@pytest.mark.parametrize("strategy", ["{use: zero1}", "{use: pp, size: 2}"])
def test_groups_of_parameters_are_those_of_one_process(strategy, tmp_path):
    groups = "[{match: '*.1.attn1.*', lr: 1e-1}, {match: '*.ff.*', weight_decay: 9}]"
    own = f"{{use: adamw, lr: 1e-3, groups: {groups}}}"
    (tmp_path / "r.yaml").write_text(RECIPE.replace("{use: adamw, lr: 1e-3}", own))
    batch = 2 if "pp" in strategy else 1
    one = [str(tmp_path / "r.yaml"), f"--set=output={tmp_path}/one", "--set=loader.batch=2"]
    two = [
        one[0],
        f"--set=output={tmp_path}/two",
        f"--set=loader.batch={batch}",
        f"--set=parallel=[{strategy}]",
    ]
    assert on_ranks(1, run_all, [one]) + on_ranks(2, run_all, [two]) == [[0]] * 3
    for mine, other in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
