"""What a training step costs outside the model: python -m benchmarks.overhead [--steps 52].

The demo's model trains from a feature cache by the `train` task, log and TensorBoard included. CPU time of
the predictor's forward pass, its error, the backward pass and the optimizer is the model's; all else is the
overhead. A second run under the profiler says where that goes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.harness import hardware, save_record, versions
from cvx_core.recipe import load, parse
from cvx_core.run import run
from cvx_core.spec import resolve
from cvx_plugins.tasks.loop import Loop
from cvx_plugins.tasks.objective import Diffusion

DEMO = Path(__file__).resolve().parents[1] / "recipes/demo/train.yaml"
ROWS, WARMUP = 96, 11
LIMIT = 0.03
"""Share of a step. The warm-up holds the first line of the log, which loads TensorBoard."""
SHOWN = 12


class Clock:
    """CPU seconds of the parts of a run, from the end of the warm-up to the start of the last step."""

    def __init__(self, steps: int):
        self.inside: dict[str, float] = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        self.total, self._steps, self._step, self._began = 0.0, steps, 0, 0.0
        self.profile: cProfile.Profile | None = None

    @property
    def is_on(self) -> bool:
        return WARMUP < self._step < self._steps

    def step(self) -> None:
        """Note that a step begins."""
        self._step += 1
        if self._step == WARMUP + 1:
            self._began = time.process_time()
            if self.profile is not None:
                self.profile.enable()
        elif self._step == self._steps:
            if self.profile is not None:
                self.profile.disable()
            self.total = time.process_time() - self._began

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that adds its CPU seconds to a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._unseen():
                began = time.process_time()
                try:
                    return function(*args, **kwargs)
                finally:
                    if self.is_on:
                        self.inside[part] += time.process_time() - began

        return call

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        """Leave what the model does out of the profile."""
        profile = self.profile if self.is_on else None
        if profile is not None:
            profile.disable()
        try:
            yield
        finally:
            if profile is not None:
                profile.enable()


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Have the training loop tell a clock what it does."""
    start, accumulate, backward = Loop.__init__, Loop._accumulate, torch.Tensor.backward
    error = Diffusion.error

    def init(self: Loop, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        module: Any = self._module
        module.forward = clock.timed("forward", module.forward)
        optimizer: Any = self._optimizer
        optimizer.step = clock.timed("optimizer", optimizer.step)
        optimizer.zero_grad = clock.timed("optimizer", optimizer.zero_grad)

    def step(self: Loop, *args: Any) -> Any:
        clock.step()
        return accumulate(self, *args)

    patched: Any = Loop
    patched.__init__, patched._accumulate = init, step
    Diffusion.error = clock.timed("forward", error)  # type: ignore[method-assign]
    torch.Tensor.backward = clock.timed("backward", backward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        patched.__init__, patched._accumulate = start, accumulate
        Diffusion.error = error  # type: ignore[method-assign]
        torch.Tensor.backward = backward  # type: ignore[method-assign]


def recipes(folder: Path, steps: int) -> tuple[str, str]:
    """Return recipes that make a feature cache of drawn clips, and that train the demo's model from it."""
    data = load(DEMO).data
    for section in ("text_encoder", "autoencoder"):
        holder = data[section] if section == "text_encoder" else data[section]["weights"]
        key = "tokenizer" if section == "text_encoder" else "path"
        holder[key] = str(DEMO.parent / holder[key])
    shared = dict(data)
    cache = {**shared, "output": str(folder / "cache"), "dataset": {"use": "synthetic", "rows": ROWS}}
    cache["task"] = {"use": "precompute"}
    for section in ("optimizer", "loader", "scheduler"):
        cache.pop(section)
    train = {**shared, "output": str(folder / "run")}
    train["dataset"] = {"use": "feature-cache", "path": str(folder / "cache")}
    train["task"] = {"use": "train", "steps": steps, "warmup": 1}
    return yaml.safe_dump(cache), yaml.safe_dump(train)


def measure(steps: int, profile: cProfile.Profile | None = None) -> Clock:
    """Train; return the clock of it."""
    clock = Clock(steps)
    clock.profile = profile
    with tempfile.TemporaryDirectory() as name:
        cache, train = recipes(Path(name), steps)
        run(resolve(parse(cache)))
        with watched(clock):
            run(resolve(parse(train)))
    return clock


def figures(clock: Clock) -> dict[str, Any]:
    """Return the shares of a run."""
    outside = clock.total - sum(clock.inside.values())
    return {
        "steps": clock._steps - WARMUP - 1,
        "cpu_s": clock.total,
        **{f"{part}_s": seconds for part, seconds in clock.inside.items()},
        "overhead_s": outside,
        "overhead": outside / clock.total,
    }


def calls(profile: cProfile.Profile) -> list[dict[str, Any]]:
    """Return the functions of this project by the CPU seconds spent in each and what it calls, the model left
    out, most first.
    """
    root = str(DEMO.parents[2])
    stats: Mapping[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    own = [
        {"function": f"{file.removeprefix(root + '/')}:{name}", "calls": found[1], "seconds": found[3]}
        for (file, _, name), found in stats.items()
        if file.startswith(f"{root}/cvx_")
    ]
    return sorted(own, key=lambda entry: -entry["seconds"])


def table(record: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table in docs/benchmarks.md."""
    found = record["figures"]
    parts = ("forward", "backward", "optimizer", "overhead")
    cells = [f"{found[f'{part}_s'] / found['cpu_s']:.1%}" for part in parts]
    return [
        "| CPU ms a step | forward | backward | optimizer | outside the model |",
        "|---|---|---|---|---|",
        f"| {found['cpu_s'] / found['steps'] * 1e3:.0f} | {' | '.join(cells)} |",
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print the table and write the record; returns 1 where the overhead is over the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--steps", type=int, default=52)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = figures(measure(options.steps))
    profile = cProfile.Profile(time.process_time)
    measure(options.steps, profile)
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.overhead", *sys.argv[1:]]),
        "hardware": hardware("cpu"),
        "versions": versions(),
        "limit": LIMIT,
        "figures": found,
        "profile": calls(profile)[:40],
    }
    print("\n".join(table(record)))
    save_record("overhead-cpu", record)
    return int(found["overhead"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
