"""The measuring side of the benchmarks: interleaved timing, peak memory, and the record of where it ran.

A case module defines `cases(device, size) -> Iterable[Case]`; every module of this package that does is run.
Ratios are theirs / ours, so that above 1 means this project is faster or smaller.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Side = Literal["ours", "theirs"]
Size = Literal["small", "full"]
Step = Callable[[], Any]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "numpy", "cvx")


@dataclass(frozen=True)
class Case:
    """Two ways to do the same work.

    ours, theirs: build the model and its input, and return the step to measure. Where steps return tensors,
    both are compared; tolerance is the largest absolute difference allowed.
    """

    name: str
    ours: Callable[[], Step]
    theirs: Callable[[], Step]
    tolerance: float = 1e-4

    def build(self, side: Side) -> Step:
        return self.ours() if side == "ours" else self.theirs()


@dataclass(frozen=True)
class Measure:
    """Medians over the repeats. cpu_s: of all threads; peak_bytes: on top of what is held between steps."""

    wall_s: float
    cpu_s: float
    peak_bytes: int | None
    wall_samples_s: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """One case measured. The ratios are theirs / ours."""

    name: str
    device: str
    ours: Measure
    theirs: Measure
    wall_ratio: float
    cpu_ratio: float
    peak_ratio: float | None
    difference: float | None

    def __str__(self) -> str:
        memory = f"{self.peak_ratio:5.2f}x" if self.peak_ratio is not None else "    -"
        return (
            f"{self.name:<36} wall {self.wall_ratio:5.2f}x  cpu {self.cpu_ratio:5.2f}x  memory {memory}"
            f"   ({self.ours.wall_s * 1e3:.1f} against {self.theirs.wall_s * 1e3:.1f} ms)"
        )


def compare(
    name: str, ours: Step, theirs: Step, *, device: str = "cpu", repeats: int = 15, warmup: int = 2
) -> Comparison:
    """Time two steps in turns, so that a change of load hits both; return medians and their ratio.

    On an accelerator the peak of allocated memory is measured too; on the CPU see `peak_of_child`.
    """
    steps: dict[Side, Step] = {"ours": ours, "theirs": theirs}
    outputs = {side: step() for side, step in steps.items()}
    difference = _difference(outputs["ours"], outputs["theirs"])
    del outputs
    for _ in range(warmup - 1):
        for step in steps.values():
            step()
    samples: dict[Side, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    sides = list(steps)
    for index in range(repeats):
        for side in sides if index % 2 else sides[::-1]:
            samples[side].append(_timed(steps[side], device))
    peaks = {side: _accelerator_peak(step, device) for side, step in steps.items()}
    return _comparison(name, device, samples, peaks, difference)


def with_peaks(result: Comparison, peaks: Mapping[Side, int | None]) -> Comparison:
    """Return a comparison with the peaks that child processes measured."""
    return replace(
        result,
        ours=replace(result.ours, peak_bytes=peaks["ours"]),
        theirs=replace(result.theirs, peak_bytes=peaks["theirs"]),
        peak_ratio=_ratio(peaks["theirs"], peaks["ours"]),
    )


def peak_of_child(case: str, side: Side, size: Size) -> int | None:
    """Return what one side adds to resident memory on the CPU, measured in a process of its own (Linux).

    There the C library is told to return every larger block at once, so that resident means live.
    """
    command = [sys.executable, "-m", "benchmarks", "--size", size, "--peak", case, side]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, cwd=RESULTS.parents[1], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    value = json.loads(done.stdout.splitlines()[-1])
    return None if value is None else int(value)


def resident_peak(step: Step) -> int | None:
    """Return by how much a step raises resident memory at its peak, in bytes; None off Linux.

    A step has run before, so what is loaded once, or stays between steps, does not count.
    """
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    step()
    gc.collect()
    before = _status_bytes("VmRSS")
    reset.write_text("5")
    step()
    return _status_bytes("VmHWM") - before


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter from its name, so that two models with the same names get the same weights."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            scale = 0.02 if parameter.ndim > 1 or name.endswith("bias") else 0.1
            value = torch.randn(parameter.shape, generator=generator) * scale
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(value + 1 if is_norm else value)
    return module


def save(result: Comparison, size: Size, folder: Path = RESULTS) -> Path:
    """Write a comparison with the hardware, the versions and the command that made it; return the file."""
    record = {
        "case": result.name,
        "size": size,
        "command": f"python -m benchmarks {' '.join(sys.argv[1:])}",
        "hardware": hardware(result.device),
        "versions": versions(),
        **{k: v for k, v in asdict(result).items() if k != "name"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}-{torch.device(result.device).type}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def save_record(name: str, record: Mapping[str, Any]) -> None:
    """Write a record among the results."""
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def hardware(device: str) -> dict[str, Any]:
    """Return what the measurement ran on."""
    info: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.device(device).type != "cpu":
        info["accelerator"] = torch.get_device_module(device).get_device_name()
    return info


def versions() -> dict[str, str | None]:
    """Return what the measurement ran with; None for what is not installed."""
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


def _timed(step: Step, device: str) -> tuple[float, float]:
    _synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    _synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def _synchronize(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def _accelerator_peak(step: Step, device: str) -> int | None:
    if torch.device(device).type == "cpu":
        return None
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    step()
    _synchronize(device)
    return int(torch.accelerator.max_memory_allocated() - before)


def _comparison(
    name: str,
    device: str,
    samples: Mapping[Side, list[tuple[float, float]]],
    peaks: Mapping[Side, int | None],
    difference: float | None,
) -> Comparison:
    measures = {}
    for side, pairs in samples.items():
        wall, cpu = zip(*pairs, strict=True)
        measures[side] = Measure(statistics.median(wall), statistics.median(cpu), peaks[side], wall)
    ours, theirs = measures["ours"], measures["theirs"]
    return Comparison(
        name=name,
        device=device,
        ours=ours,
        theirs=theirs,
        wall_ratio=theirs.wall_s / ours.wall_s,
        cpu_ratio=theirs.cpu_s / ours.cpu_s,
        peak_ratio=_ratio(theirs.peak_bytes, ours.peak_bytes),
        difference=difference,
    )


def _ratio(theirs: int | None, ours: int | None) -> float | None:
    return theirs / ours if theirs and ours else None


def _difference(ours: Any, theirs: Any) -> float | None:
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return None
    return float((ours.float() - theirs.float()).abs().max())


def _status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
