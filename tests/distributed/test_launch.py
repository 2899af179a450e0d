"""Runs under torchrun: the table at the start, one set of files; a rank that is killed, and going on."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cvx_core.watch import BEAT_S
from tests.distributed.harness import on_ranks
from tests.distributed.test_train import RECIPE, lines, run_all

DDP = "parallel=[{use: ddp}]"
LIMIT_S = 100


def torchrun(path: Path, *options: str, settings: tuple[str, ...] = ()) -> subprocess.Popen:
    """Start a launcher; what it and its ranks print comes out of one pipe."""
    argv = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "cvx_core.run", str(path)]
    argv += [f"--set={setting}" for setting in settings]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(argv, env=env, start_new_session=True, **pipe)


def end(launcher: subprocess.Popen) -> str:
    """Return what a launcher printed, after it has ended; in time."""
    try:
        return launcher.communicate(timeout=LIMIT_S)[0]
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGKILL)
        pytest.fail(f"did not end within {LIMIT_S} s: {launcher.communicate()[0]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def test_two_ranks_make_one_run(recipe, tmp_path):
    settings = (f"output={tmp_path / 'out'}", DDP)
    launcher = torchrun(recipe, "--standalone", "--nproc-per-node", "2", settings=settings)
    said = end(launcher)
    assert launcher.returncode == 0, said
    for once in ("rank  host", "r.yaml: ok", "ddp: dp_replicate 2 = 2 processes", "train 4/4", "exported"):
        assert said.count(once) == 1, said
    assert [line["step"] for line in lines(tmp_path / "out")] == [1, 2, 3, 4]
    assert (tmp_path / "out" / "model" / "transformer").is_dir()


def test_without_strategies_two_ranks_are_refused(recipe):
    launcher = torchrun(recipe, "--standalone", "--nproc-per-node", "2")
    said = end(launcher)
    assert launcher.returncode != 0
    assert "2 processes share the work. Add `parallel: [{use: ddp}]`" in said
    assert "Traceback" not in said.split("torch/distributed")[0]


@pytest.mark.matrix
def test_a_killed_rank_is_named_all_stop_and_a_restart_ends_as_if_nothing_had_been(recipe, tmp_path):
    """Two launchers, as on two hosts; rank 1 is killed in the middle of a step."""
    out, other = tmp_path / "out", tmp_path / "undisturbed"
    settings = (DDP, "task.save_every=2", "task.export=null", "task.steps=2000", "timeout_s=5")
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    options += ["--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "test"]
    launchers = [torchrun(recipe, *options, settings=(*settings, f"output={out}")) for _ in range(2)]
    try:
        kill_rank_1(launchers, out)
    finally:
        for launcher in launchers:
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
    stop_at = lines(out)[-1]["step"] + 6
    again = [str(recipe), *(f"--set={setting}" for setting in settings), f"--set=task.stop_at={stop_at}"]
    runs = [[*again, f"--set=output={out}", "--set=task.resume=auto"], [*again, f"--set=output={other}"]]
    assert on_ranks(2, run_all, runs) == [[0, 0]] * 2
    assert lines(out) == lines(other)


def kill_rank_1(launchers: list[subprocess.Popen], out: Path) -> None:
    """Kill rank 1 after step 3; assert that all ends, that it is named, and that the launchers say so too."""
    wait_for_steps(out, 3)
    time.sleep(4 * BEAT_S)  # a rank is named with the step that it last spoke of
    rank = process_of(launchers, 1)
    os.kill(rank, signal.SIGKILL)
    killed = time.monotonic()
    said = "".join(end(launcher) for launcher in launchers)
    assert time.monotonic() - killed < 60
    assert all(launcher.returncode != 0 for launcher in launchers)
    named = rf"rank 1 \(\S+, process {rank}\) is gone: not heard of for \d+ s, last in (saving )?step \d+"
    assert re.search(named, said), said


def wait_for_steps(out: Path, count: int) -> None:
    began = time.monotonic()
    while not (out / "log.jsonl").exists() or len(lines(out)) < count:
        assert time.monotonic() - began < LIMIT_S
        time.sleep(0.02)


def process_of(launchers: list[subprocess.Popen], rank: int) -> int:
    """Return the process of a rank among those that launchers have started."""
    return next(
        process for launcher in launchers for process in children(launcher.pid) if is_rank(process, rank)
    )


def children(process: int) -> list[int]:
    """Return the processes that a process has started."""
    return [int(item) for item in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_rank(process: int, rank: int) -> bool:
    return f"RANK={rank}".encode() in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
