"""Convert a made-up checkpoint of CogVideoX-5B and compare with `cp`: python -m benchmarks.convert.

SAT -> HF -> Megatron (TP 2, PP in four stages) -> HF, at full size by default. Each conversion and each copy
is a process of its own, in turns, and finds memory alike: full, and nothing of its source cached. All files
are removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, hardware, versions
from benchmarks.process import Usage, files_of, full_memory, run, size_of
from benchmarks.synthetic import Model
from cvx_core.interfaces import Tensors
from cvx_core.registry import Registry
from cvx_io.tensors.dtypes import num_bytes
from cvx_plugins.formats import even

PRESET = "cogvideox-5b"
STAGES = 4
SPACE = 2.2
"""Free disk space needed, as a multiple of the checkpoint: a source, what is made of it, and a margin."""
MEMORY_LIMIT = 400_000_000
DRY_RUN_LIMIT_S = 2.0
BARE = "import torch; from benchmarks.process import private_bytes; print(private_bytes('self'))"


@dataclass(frozen=True)
class Leg:
    """One conversion. limit: what its time may be, as a multiple of the time of `cp`."""

    source: str
    target: str
    limit: float
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


@dataclass(frozen=True)
class Bare:
    """An interpreter that imports torch and ends: best time, largest private memory."""

    wall_s: float
    private_bytes: int


@dataclass(frozen=True)
class Result:
    """One leg measured; times are medians over the repeats, ratios are of medians, and peaks are the largest.

    peak_bytes: private memory on top of the bare interpreter's. A copy's sync_s is the time to have it on the
    disk after `cp` has returned; a conversion includes that. tensors: how many were compared, to the bit.
    """

    name: str
    bytes_read: int
    bytes_written: int
    wall_s: float
    cpu_s: float
    peak_bytes: int
    copy_wall_s: float
    copy_cpu_s: float
    copy_sync_s: float
    ratio: float
    ratio_synced: float
    limit: float
    tensors: int
    wall_samples_s: tuple[float, ...]
    copy_wall_samples_s: tuple[float, ...]

    def __str__(self) -> str:
        return (
            f"{self.name:<15} {self.wall_s:6.2f} {self.copy_wall_s:6.2f} {self.copy_sync_s:6.2f} "
            f"{self.ratio:6.2f}x {self.ratio_synced:6.2f}x {self.limit:5.1f}x "
            f"{self.cpu_s:7.2f} {self.copy_cpu_s:7.2f} "
            f"{self.peak_bytes / 1e6:7.0f} {MEMORY_LIMIT / 1e6:6.0f} {self.tensors:6}"
        )


HEADER = "                wall_s   cp_s sync_s   / cp  / both  limit   cpu_s   cp_cpu mem_MB  limit  equal"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and record; returns 1 where there is too little space or a step fails."""
    options = _parser().parse_args(arguments)
    layers = {} if options.layers is None else {"num_layers": options.layers}
    model = Model(PRESET, {**json.loads(options.fields), **layers})
    if options.compare:
        print(compare(model, options.compare[0], Path(options.compare[1])))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that it, too, leaves nothing behind
    options.folder.mkdir(parents=True, exist_ok=True)
    needed, free = SPACE * total_bytes(model.sat()), shutil.disk_usage(options.folder).free
    if free < needed:
        print(
            f"{options.folder}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are needed. "
            "Give a folder on another disk, or fewer --layers.",
            file=sys.stderr,
        )
        return 1
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            record = measure(model, Path(folder), options.repeats)
    except subprocess.CalledProcessError as error:
        print(f"{error}\n{error.output}", file=sys.stderr)
        return 1
    options.json.mkdir(parents=True, exist_ok=True)
    (options.json / "convert.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(model: Model, folder: Path, repeats: int) -> dict[str, Any]:
    """Run every step in `folder`, print each, and return the record."""
    source = folder / "sat"
    model.write_sat(source)
    print(f"source: {len(model.sat().index)} tensors, {size_of(source) / 1e9:.2f} GB")
    bare, dry = start(model, source, folder / "dry")
    print(f"importing torch: {bare.wall_s:.2f} s, {bare.private_bytes / 1e6:.0f} MB")
    print(f"dry run: {dry - bare.wall_s:.2f} s after importing torch (limit {DRY_RUN_LIMIT_S} s)")
    print(HEADER, flush=True)
    results = []
    for number, leg in enumerate(legs(model)):
        target = folder / f"{number}-{leg.target}"
        results.append(measure_leg(leg, model, source, target, repeats, bare))
        print(results[-1], flush=True)
        shutil.rmtree(source)
        source = target
    return {
        "command": f"python -m benchmarks.convert {' '.join(sys.argv[1:])}".strip(),
        "hardware": {**hardware("cpu"), "load_average": os.getloadavg()[2]},
        "versions": versions(),
        "model": {"preset": model.preset, **model.fields},
        "import_torch": asdict(bare),
        "dry_run_s": dry,
        "dry_run_after_import_s": dry - bare.wall_s,
        "limits": {"peak_bytes": MEMORY_LIMIT, "dry_run_after_import_s": DRY_RUN_LIMIT_S},
        "conversions": [asdict(result) for result in results],
    }


def measure_leg(leg: Leg, model: Model, source: Path, target: Path, repeats: int, bare: Bare) -> Result:
    """Copy and convert in turns, then compare the last conversion with what it should hold."""
    copies: list[tuple[Usage, Usage]] = []
    runs: list[Usage] = []
    for _ in range(repeats):
        shutil.rmtree(target, ignore_errors=True)
        copies.append(copy(source, target))
        shutil.rmtree(target)
        with full_memory(source.parent, source):
            runs.append(run(_convert(model, source, target, leg)))
    check = [sys.executable, "-m", "benchmarks.convert", "--fields", json.dumps(dict(model.fields))]
    compared = run([*check, "--compare", leg.target, target])
    wall, copy_wall = _median(use.wall_s for use in runs), _median(cp.wall_s for cp, _ in copies)
    return Result(
        name=str(leg),
        bytes_read=size_of(source),
        bytes_written=size_of(target),
        wall_s=wall,
        cpu_s=_median(use.cpu_s for use in runs),
        peak_bytes=max(use.private_bytes for use in runs) - bare.private_bytes,
        copy_wall_s=copy_wall,
        copy_cpu_s=_median(cp.cpu_s for cp, _ in copies),
        copy_sync_s=_median(sync.wall_s for _, sync in copies),
        ratio=wall / copy_wall,
        ratio_synced=wall / _median(cp.wall_s + sync.wall_s for cp, sync in copies),
        limit=leg.limit,
        tensors=int(compared.output),
        wall_samples_s=tuple(use.wall_s for use in runs),
        copy_wall_samples_s=tuple(cp.wall_s for cp, _ in copies),
    )


def copy(source: Path, target: Path) -> tuple[Usage, Usage]:
    """Copy a folder with `cp`, then have it written to the disk."""
    with full_memory(source.parent, source):
        return run(["cp", "-r", source, target]), run(["sync", *files_of(target)])


def start(model: Model, source: Path, target: Path, repeats: int = 3) -> tuple[Bare, float]:
    """Measure, in turns, an interpreter that only imports torch, and the best time of a dry run."""
    leg, *_ = legs(model)
    bare, dry = [], []
    for _ in range(repeats):
        bare.append(run([sys.executable, "-c", BARE]))
        dry.append(run(_convert(model, source, target, leg, "--dry-run")).wall_s)
    return Bare(min(use.wall_s for use in bare), max(int(use.output) for use in bare)), min(dry)


def compare(model: Model, name: str, path: Path) -> int:
    """Return the number of tensors at `path`, all as drawn. Raises SystemExit naming those that are not."""
    registry = Registry.discover()
    component = registry.get("format", name)
    assert component.config is not None
    table = f"{model.config.family}:{name}"
    names = registry.get("names", table).load() if table in registry.names("names") else None
    found: Tensors = component.load()(component.config(**component.preset), None).open(path, names)
    if wrong := model.differences(found):
        raise SystemExit(f"{path}: {len(wrong)} tensors differ, first {wrong[0]!r}")
    return len(model.tensors.index)


def legs(model: Model) -> tuple[Leg, ...]:
    """Return the conversions, in order; each reads what the one before wrote."""
    layers = model.config.num_layers
    stages = even(layers, min(layers, STAGES))
    settings = ("--set", "tp=2", "--set", f"pp={json.dumps(stages)}")
    return Leg("sat", "hf", 1.3), Leg("hf", "megatron", 2.0, settings), Leg("megatron", "hf", 2.0)


def total_bytes(tensors: Tensors) -> int:
    """Return the bytes of all tensors."""
    return sum(map(num_bytes, tensors.index.values()))


def _convert(model: Model, source: Path, target: Path, leg: Leg, *more: str) -> list[str | Path]:
    fields = [word for name, value in model.fields.items() for word in ("--set-model", f"{name}={value}")]
    command: list[str | Path] = [sys.executable, "-m", "cvx_io.convert", source, target, "--to", leg.target]
    return [*command, "--model", model.preset, *fields, *leg.settings, *more]


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to work")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, help="layers of the model, all by default")
    parser.add_argument("--fields", default="{}", metavar="JSON", help="other fields to change")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="DIR", help="folder of the record")
    parser.add_argument(
        "--compare", nargs=2, metavar=("FORMAT", "PATH"), help="only compare a checkpoint with what is drawn"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
