"""Ranks that are stopped or killed, the first one too, which holds the store: the others name it and end."""

import multiprocessing
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cvx_core.joining import joined
from cvx_core.recipe import load
from cvx_core.spec import resolve
from cvx_core.world import World
from tests.distributed.harness import on_ranks  # noqa: F401  # sets what the fork server loads
from tests.distributed.test_launch import DDP, end, free_port, process_of, torchrun, wait_for_steps
from tests.distributed.test_train import RECIPE

TIMEOUT_S = 5.0
LIMIT_S = 30.0

pytestmark = pytest.mark.slow


def step_on(rank: int, port: int, recipe: Path, busy: int) -> None:
    """Join the other rank as without a launcher, and reduce for ever; said on stderr, which is a file.

    busy: the rank that computes between two collectives, so that the other one waits in them.
    """
    os.dup2(os.open(recipe.with_name(f"said{rank}"), os.O_CREAT | os.O_WRONLY), 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    spec = resolve(load(str(recipe), [DDP, f"timeout_s={TIMEOUT_S}"]), world=2)
    with joined(World.stated(), spec, torch.device("cpu")) as mark:
        for step in range(10**9):
            mark(f"step {step}")
            dist.all_reduce(torch.ones(2))
            time.sleep(0.02 if rank == busy else 0)
            recipe.with_name(f"ready{rank}").touch()


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def wait_for(path: Path) -> None:
    limit = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < limit, f"no {path.name}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("faulty", "sent"),
    [(0, signal.SIGSTOP), (1, signal.SIGSTOP), (0, signal.SIGKILL), (1, signal.SIGKILL)],
    ids=lambda item: getattr(item, "name", item),
)
def test_the_other_rank_names_it_and_ends(faulty, sent, recipe):
    port, other = free_port(), 1 - faulty
    make = multiprocessing.get_context("forkserver").Process
    processes = [make(target=step_on, args=(rank, port, recipe, faulty)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        for rank in range(2):
            wait_for(recipe.with_name(f"ready{rank}"))
        os.kill(processes[faulty].pid, sent)
        processes[other].join(LIMIT_S)
        said = recipe.with_name(f"said{other}").read_text()
        assert processes[other].exitcode == 1, said
    finally:
        for process in processes:
            process.kill()
    pid = processes[faulty].pid
    assert re.search(rf"rank {faulty} \(\S+, process {pid}\) is gone.*All ranks stop\.", said), said


@pytest.mark.matrix
@pytest.mark.parametrize(("stopped", "terminated"), [(0, False), (0, True), (1, True)])
def test_a_stopped_rank_keeps_no_run_going(stopped, terminated, recipe, tmp_path):
    """Also where the launcher is told to end, and passes it on to ranks of which one cannot hear it."""
    settings = (DDP, f"output={tmp_path / 'out'}", "task.steps=100000", "task.export=null")
    settings += (f"timeout_s={TIMEOUT_S}",)
    launcher = torchrun(recipe, "--standalone", "--nproc-per-node", "2", settings=settings)
    try:
        wait_for_steps(tmp_path / "out", 3)
        faulty, other = (process_of([launcher], rank) for rank in (stopped, 1 - stopped))
        os.kill(faulty, signal.SIGSTOP)
        began = time.monotonic()
        if terminated:
            launcher.send_signal(signal.SIGTERM)
        while is_alive(other):
            assert time.monotonic() - began < 20, "it ends of its own accord; a launcher kills it after 30 s"
            time.sleep(0.02)
        os.kill(faulty, signal.SIGKILL)  # as the launcher would
        said = end(launcher)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode != 0
    assert re.search(rf"rank {stopped} \(\S+, process {faulty}\) is gone: not heard of for \d+ s", said), said


def is_alive(process: int) -> bool:
    """Tell whether a process runs; one that has ended and was not asked for yet does not."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False
