"""How fast rows of a feature cache become batches: python -m benchmarks.loader [--rows 64] [--folder DIR].

Items have the size of a released 5B model's: clips of 49 x 480 x 720 in float32, texts of 226 tokens in
bfloat16. Files lie in the page cache, so this is the loader's own speed, not the disk's. Beside it: reading
the same files one after the other with the safetensors library, on the same cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.harness import RESULTS, hardware, versions
from cvx_core.interfaces import Row
from cvx_io.cache.items import items_in, write_item
from cvx_io.loader import Loader
from cvx_io.video import Pick
from cvx_plugins.datasets.cached import Features
from cvx_plugins.tasks.rows import Decode

LATENT, TEXT = (16, 13, 60, 90), (226, 4096)
LIMIT = 2e9
"""Bytes a second that the fastest setting has to reach."""


def fill(folder: Path, count: int) -> list[Row]:
    """Write a cache of random rows; return them."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        mean, std = torch.randn(2, *LATENT, generator=generator)
        embeds = torch.randn(TEXT, generator=generator).bfloat16()
        made = {"kind": "latent", "source": str(number)}
        latent = write_item(folder, "latent", made, (mean, std.abs()))
        text = write_item(folder, "text", made, (embeds, torch.ones(TEXT[0], dtype=torch.bool)))
        caption = f"caption {number}"
        rows.append(Row(str(number), (caption,), features=Features({"latent": latent}, {caption: text})))
    return rows


def measure(epoch: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Return medians of an epoch's wall and CPU seconds, those of its workers included."""
    walls, cpus = [], []
    for _ in range(repeats):
        wall, before = time.perf_counter(), os.times()
        epoch()
        after = os.times()
        walls.append(time.perf_counter() - wall)
        cpus.append(sum(after[:4]) - sum(before[:4]))
    return {"wall_s": statistics.median(walls), "cpu_s": statistics.median(cpus), "wall_samples_s": walls}


def loaded(rows: list[Row], workers: int) -> Callable[[], None]:
    """Return an epoch of the loader that `train` uses; one value of every batch is looked at."""

    def epoch() -> None:
        decode = Decode(None, Pick(49, 8), 480, 720)
        for _, batch in Loader(rows, decode, batch=4, workers=workers).iterate(epochs=1):
            assert batch.encoded is not None
            assert all(item.video.mean[0, 0, 0, 0].isfinite() for item in batch.encoded)

    return epoch


def plain(folder: Path) -> Callable[[], None]:
    """Return an epoch of the safetensors library; values are copied, for a map is not read before that."""

    def epoch() -> None:
        for _, path in items_in(folder):
            assert all(tensor.clone().numel() for tensor in load_file(path).values())

    return epoch


def table(record: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table in docs/benchmarks.md."""
    rates = ("bytes_per_second", "bytes_per_cpu_second")
    lines = ["| | GB/s | GB per CPU second |", "|---|---|---|"]
    for name, found in record["settings"].items():
        lines.append(f"| {name} | {' | '.join(f'{found[rate] / 1e9:.2f}' for rate in rates)} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each setting and write the record; returns 1 where none reaches the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("--rows", type=int, default=64, help="rows of 11 MB (64)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to put the cache; a temporary folder by default")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        rows = fill(folder, options.rows)
        size = sum(path.stat().st_size for _, path in items_in(folder))
        settings = {f"loader, {n} workers": loaded(rows, n) for n in (0, 1, 2)}
        settings["safetensors, one after the other"] = plain(folder)
        found = {what: measure(epoch, options.repeats) for what, epoch in settings.items()}
    for what, value in found.items():
        value["bytes_per_second"] = size / value["wall_s"]
        value["bytes_per_cpu_second"] = size / value["cpu_s"]
        print(
            f"{what:<34} {value['bytes_per_second'] / 1e9:5.2f} GB/s  "
            f"{value['bytes_per_cpu_second'] / 1e9:5.2f} GB per CPU second"
        )
    record = {
        "command": f"python -m benchmarks.loader {' '.join(sys.argv[1:])}".strip(),
        "hardware": hardware("cpu"),
        "versions": versions(),
        "rows": options.rows,
        "bytes": size,
        "limit_bytes_per_second": LIMIT,
        "settings": found,
    }
    (RESULTS / "loader-cpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    best = max(value["bytes_per_second"] for what, value in found.items() if what.startswith("loader"))
    return int(best < LIMIT)


if __name__ == "__main__":
    sys.exit(main())
