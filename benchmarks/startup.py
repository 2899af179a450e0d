"""How long the commands take that build nothing: python -m benchmarks.startup."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import RESULTS, hardware

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 0.5
COMMANDS = {
    "import cvx_core": ["-c", "import cvx_core"],
    "--help": ["-m", "cvx_core.run", "--help"],
    "--list": ["-m", "cvx_core.run", "--list"],
    "--check": ["-m", "cvx_core.run", "recipes/tiny.yaml", "--check"],
    "python -c pass": ["-c", "pass"],
}


def measure(arguments: list[str]) -> tuple[float, float]:
    """Return wall and CPU seconds of one run of the interpreter."""
    wall, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - wall, cpu


def main(repeats: int = 11) -> int:
    """Print the median of each command; returns 1 where one takes more CPU time than the limit."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(repeats):
        for name, arguments in COMMANDS.items():
            samples[name].append(measure(arguments))
    medians = {
        name: {
            "wall_s": statistics.median(w for w, _ in runs),
            "cpu_s": statistics.median(c for _, c in runs),
        }
        for name, runs in samples.items()
    }
    for name, value in medians.items():
        print(f"{name:<16} wall {value['wall_s']:.3f} s  cpu {value['cpu_s']:.3f} s")
    record = {"command": "python -m benchmarks.startup", "hardware": hardware("cpu"), "commands": medians}
    (RESULTS / "startup.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(any(value["cpu_s"] > LIMIT_S for value in medians.values()))


if __name__ == "__main__":
    sys.exit(main())
