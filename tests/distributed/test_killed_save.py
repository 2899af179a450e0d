"""A process killed while it saves, alone or not: the run goes on from the save before, and says so."""

import itertools
import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from cvx_core import run
from cvx_core.mesh import Degrees, Mesh
from cvx_io import resume
from tests.distributed.harness import on_ranks

RECIPE = """
device: cpu
video: {frames: 1, height: 32, width: 32, fps: 8}
predictor:
  use: cogvideox
  num_layers: 1
  num_heads: 2
  head_dim: 16
  latent_channels: 4
  text_dim: 16
  text_length: 4
  temb_dim: 16
text_encoder: {use: t5, num_layers: 1, dim: 16, num_heads: 2, max_length: 4, tokenizer: bytes}
autoencoder: {use: cogvideox-vae, latent_channels: 4, base_channels: 4, blocks_per_level: 1}
dataset: {use: synthetic, rows: 6}
optimizer: {use: adamw, lr: 1e-3}
task: {use: train, steps: 3, trackers: [], save_every: 1, resume: auto}
"""
ZERO3 = "parallel=[{use: zero3}]"


def go(argv: list[str]) -> list[str]:
    """Run a recipe; return what it logged."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("cvx").addHandler(handler)
    logging.getLogger("cvx").setLevel(logging.INFO)
    assert run.main(argv) == 0
    return said


def go_and_die(argv: list[str], rank: int, point: str) -> list[str]:
    """Run a recipe in which one rank kills itself in its second save."""
    if int(os.environ["RANK"]) == rank:
        patch(point)
    return go(argv)


def patch(point: str) -> None:
    """Have this process kill itself instead of saving, once data is written, or before the last rename."""
    if point == "begin":
        resume.dcp.save = at_call(2, resume.dcp.save)
    elif point == "written":
        write = FileSystemWriter.write_data
        calls = itertools.count(1)

        def written(*args, **options):
            done = write(*args, **options)
            done.wait()
            return kill() if next(calls) == 2 else done

        FileSystemWriter.write_data = written
    else:
        replace = os.replace

        def last(source, target):
            if Path(target).match("step-00000002/manifest.json"):
                kill()
            replace(source, target)

        os.replace = last


def at_call(number: int, call):
    """Return `call`, except that its number-th call kills the process."""
    calls = itertools.count(1)
    return lambda *args, **options: kill() if next(calls) == number else call(*args, **options)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    """Return what makes the arguments of a run, by its folder and settings."""
    file = tmp_path_factory.mktemp("recipe") / "r.yaml"
    file.write_text(RECIPE)
    return lambda out, *settings: [str(file), f"--set=output={out}", *(f"--set={item}" for item in settings)]


@pytest.fixture(scope="module")
def undisturbed(argv, tmp_path_factory) -> dict[int, list[dict]]:
    """The log of a run that nobody killed, by ranks."""
    result = {}
    for world, settings in ((1, []), (2, [ZERO3])):
        folder = tmp_path_factory.mktemp("undisturbed")
        on_ranks(world, go, argv(folder, *settings))
        result[world] = lines(folder)
    return result


@pytest.mark.parametrize(
    ("world", "rank", "point", "beside"),
    [
        (1, 0, "rename", False),
        (1, 0, "written", True),
        (2, 0, "begin", False),
        (2, 1, "written", True),
        pytest.param(1, 0, "written", False, marks=pytest.mark.slow),
        pytest.param(1, 0, "rename", True, marks=pytest.mark.slow),
        pytest.param(2, 1, "written", False, marks=pytest.mark.slow),
        pytest.param(2, 0, "rename", False, marks=pytest.mark.slow),
        pytest.param(2, 0, "rename", True, marks=pytest.mark.slow),
        pytest.param(2, 1, "begin", False, marks=pytest.mark.slow),
    ],
)
def test_goes_on_from_the_save_before(world, rank, point, beside, argv, undisturbed, tmp_path):
    """beside: saves are written while the steps go on."""
    settings = [f"task.async_save={str(beside).lower()}", *([ZERO3] if world > 1 else [])]
    arguments = argv(tmp_path, *settings)
    with pytest.raises(AssertionError, match=f"rank {rank}:\nended without a result"):
        on_ranks(world, go_and_die, arguments, rank, point)
    checkpoints = tmp_path / "checkpoints"
    assert [path.name for path in resume.complete(checkpoints)] == ["step-00000001"]
    left = [path for path in checkpoints.iterdir() if path.name != "step-00000001"]
    said = on_ranks(world, go, arguments)[0]
    assert any(line.startswith("resumed from") and line.endswith("step-00000001") for line in said)
    warned = "saving step-00000002 was interrupted, so the run goes on from step-00000001"
    assert (warned in said) == bool(left)
    assert left or rank == 1, "what the first rank was writing is there, for nobody could remove it"
    assert lines(tmp_path) == undisturbed[world]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000003"]


def found(folder: Path) -> str:
    """Return what this rank goes on from, as one of two that share the reading."""
    return resume.find(folder, "auto", Mesh(Degrees({"dp_shard": 2}), int(os.environ["RANK"]))).name


def test_ranks_agree_on_the_save_before_a_damaged_one(tmp_path):
    for step in (1, 2):
        path = resume.save(tmp_path, step, {"w": torch.full((3,), float(step))}, {}, 2)
    [data] = path.glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert on_ranks(2, found, tmp_path) == ["step-00000001"] * 2
    assert sorted(item.name for item in tmp_path.iterdir()) == ["damaged-step-00000002", "step-00000001"]
