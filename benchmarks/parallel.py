"""What strategies cost and gain, beside one process, in turns: python -m benchmarks.parallel.

Every process has one thread. All sides do the same step: the same rows over all ranks, forward, backward and
update. `pair` is the ceiling of this machine: the same as ddp, with nothing sent.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from benchmarks.harness import RESULTS, hardware, save_record, versions
from cvx_core.building import build
from cvx_core.device import keep_freed_memory
from cvx_core.interfaces import Features, ParamGroup, Parts
from cvx_core.placing import place
from cvx_core.random import Draws, keyed
from cvx_core.recipe import parse
from cvx_core.spec import resolve
from cvx_parallel.gradients import clip

ROWS = 8
RECIPE = {
    "device": "cpu",
    "video": {"frames": 33, "height": 128, "width": 128},
    "predictor": {
        "use": "cogvideox",
        "num_layers": 6,
        "num_heads": 8,
        "head_dim": 48,
        "latent_channels": 8,
        "text_dim": 64,
        "text_length": 16,
        "temb_dim": 128,
    },
    "autoencoder": {"use": "cogvideox-vae", "latent_channels": 8, "base_channels": 8, "blocks_per_level": 1},
    "text_encoder": {"use": "t5", "num_layers": 1, "dim": 64, "num_heads": 2, "tokenizer": "bytes"},
    "dataset": {"use": "synthetic", "rows": ROWS},
    "loader": {"batch": ROWS},
    "optimizer": {"use": "adamw", "lr": 1e-4},
    "task": {"use": "train", "steps": 1000},
}
"""The demo's predictor three times as wide, with half as many blocks again: 16 million parameters."""
STRATEGIES: Mapping[str, list[dict[str, Any]]] = {
    "ddp": [{"use": "ddp"}],
    "zero1": [{"use": "zero1"}],
    "zero2": [{"use": "zero2"}],
    "zero3": [{"use": "zero3"}],
    "layerzero": [{"use": "layerzero", "zero3_size": 2}],
    "tp": [{"use": "tp", "size": 2}],
    "tp, sequence": [{"use": "tp", "size": 2, "sequence": True}],
    "cp, ulysses": [{"use": "cp", "ulysses": 2}],
    "cp, ring": [{"use": "cp", "ring": 2}],
    "pp, 1f1b": [{"use": "pp", "size": 2, "schedule": "1f1b", "microbatches": 8}],
    "pp, zero-bubble": [{"use": "pp", "size": 2, "schedule": "zero-bubble", "microbatches": 8}],
    "recompute": [{"use": "recompute"}],
    "recompute, selective": [{"use": "recompute", "mode": "selective"}],
}
ONE = ("recompute", "recompute, selective")
"""Strategies of one process."""
AT_LEAST = {"ddp": 1.8, "zero2": 1.8}


@dataclass(frozen=True)
class Took:
    """Seconds of a step: of the slowest rank by the clock, and of all ranks' processors."""

    wall_s: float
    cpu_s: float


class Team:
    """Processes that do a step when told to."""

    def __init__(self, text: str, world: int, folder: Path, joined: bool = True):
        """Start them; joined: as ranks of one run, else each on its own."""
        spawn = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            here, there = spawn.Pipe()
            place_ = (rank, world) if joined else (0, 1)
            process = spawn.Process(target=_serve, args=(there, text, *place_, str(folder)), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def step(self) -> Took:
        """Have all do one step, at the same time."""
        began = time.perf_counter()
        for pipe in self._pipes:
            pipe.send("step")
        cpu = sum(pipe.recv() for pipe in self._pipes)
        return Took(time.perf_counter() - began, cpu)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()


def _serve(pipe: Connection, text: str, rank: int, world: int, folder: str) -> None:
    """Be one process of a team: make the model, then a step, and its CPU seconds, for each message."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    keep_freed_memory()
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    steps = _steps(text)
    next(steps)
    gc.collect()
    gc.freeze()  # as a run does (cvx_core.collecting): each step would go through all that torch imported
    pipe.send("ready")
    while pipe.recv() is not None:
        began = time.process_time()
        next(steps)
        pipe.send(time.process_time() - began)


def _steps(text: str) -> Iterator[None]:
    """Do one training step at each `next`."""
    spec = resolve(parse(text))
    parts = place(build(spec), spec)
    assert parts.make_optimizer is not None
    assert parts.forward_backward is not None
    named = [(name, p) for name, p in parts.trained.named_parameters() if name in parts.trainable]
    optimizer = parts.make_optimizer([ParamGroup(named, {})])
    features, draws = _share(parts, spec.config("predictor"), spec.config("loader").batch)
    while True:
        parts.before_update(True)
        parts.forward_backward(features, draws)
        parts.after_backward()
        clip([p for _, p in named], 1.0, parts.mesh)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


def _share(parts: Parts, config: Any, rows: int) -> tuple[Features, Draws]:
    """Return this rank's rows: the loader's batch is that of one data rank."""
    rank, world = parts.mesh.place("batch"), parts.mesh.size("batch")
    generator = keyed(0, "benchmark", rank)
    latent = torch.randn(rows, config.latent_channels, 9, 16, 16, generator=generator)
    text = torch.randn(rows, config.text_length, config.text_dim, generator=generator)
    mask = torch.ones(rows, config.text_length, dtype=torch.bool)
    return Features(latent, text, mask), Draws(0, 0, tuple(range(rank, rows * world, world)), rank, world)


def _recipe(parallel: Sequence[Mapping[str, Any]], rows: int) -> str:
    return yaml.safe_dump({**RECIPE, "loader": {"batch": rows}, "parallel": [dict(p) for p in parallel]})


@contextmanager
def _team(name: str, rows: int) -> Iterator[Team]:
    """Yield the processes of a side: "alone", "pair" or a strategy."""
    shares_rows = name in ("pair", "ddp", "zero1", "zero2", "zero3", "layerzero")
    text = _recipe(STRATEGIES.get(name, []), rows // 2 if shares_rows else rows)
    with tempfile.TemporaryDirectory() as folder:
        world = 1 if name == "alone" or name in ONE else 2
        team = Team(text, world, Path(folder), joined=name != "pair")
        try:
            yield team
        finally:
            team.close()


def measure(name: str, rows: int, repeats: int) -> dict[str, Any]:
    """Measure a side beside one process, in turns; times and their medians."""
    with _team("alone", rows) as alone, _team(name, rows) as side:
        samples: dict[str, list[Took]] = {"alone": [], "side": []}
        for number in range(repeats + 1):
            order = [("alone", alone), ("side", side)]
            for key, team in order if number % 2 else order[::-1]:
                took = team.step()
                if number:  # the first warms up
                    samples[key].append(took)
    wall = {key: statistics.median(t.wall_s for t in took) for key, took in samples.items()}
    cpu = {key: statistics.median(t.cpu_s for t in took) for key, took in samples.items()}
    return {
        "alone_wall_s": wall["alone"],
        "wall_s": wall["side"],
        "times_as_fast": wall["alone"] / wall["side"],
        "more_cpu": cpu["side"] / cpu["alone"] - 1,
        "wall_samples_s": {key: [round(t.wall_s, 4) for t in took] for key, took in samples.items()},
    }


def merged(results: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return a record of results, and of those recorded before on the same machine with as many rows."""
    file = RESULTS / "parallel.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    place = {"hardware": {**hardware("cpu"), "threads": 1}, "versions": versions(), "rows": rows}
    is_same = all(before.get(key) == value for key, value in place.items())
    command = shlex.join(["python", "-m", "benchmarks.parallel", *sys.argv[1:]])
    known = {**(before["results"] if is_same else {})}
    known |= {name: {"command": command, **result} for name, result in results.items()}
    return {**place, "results": {name: known[name] for name in ("pair", *STRATEGIES) if name in known}}


def table(record: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table in docs/benchmarks.md."""
    lines = ["| | times as fast as one process | more CPU time |", "|---|---|---|"]
    for name, found in record["results"].items():
        lines.append(f"| {name} | {found['times_as_fast']:.2f} | {found['more_cpu']:.0%} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Print a line per strategy; returns 1 where one is slower than it must be."""
    options = _parser().parse_args(arguments)
    names = options.only or ("pair", *STRATEGIES)
    results = {}
    for name in names:
        results[name] = result = measure(name, options.rows, options.repeats)
        print(
            f"{name:<22} {result['times_as_fast']:5.2f} times as fast as one process, "
            f"{result['more_cpu']:+7.1%} CPU  ({result['wall_s']:.2f} s, one {result['alone_wall_s']:.2f} s)",
            flush=True,
        )
        save_record("parallel", merged(results, options.rows))  # what is cut short keeps these
    slow = [
        name for name, least in AT_LEAST.items() if results.get(name, {}).get("times_as_fast", least) < least
    ]
    for name in slow:
        print(f"{name} is to be at least {AT_LEAST[name]} times as fast as one process", file=sys.stderr)
    return int(bool(slow))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=("pair", *STRATEGIES), help="of the strategies, these")
    parser.add_argument("--rows", type=int, default=ROWS, help="clips of a step, over all ranks")
    parser.add_argument("--repeats", type=int, default=9)
    return parser


if __name__ == "__main__":
    sys.exit(main())
