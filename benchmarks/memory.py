"""Peak memory of a training step by switch: python -m benchmarks.memory [--device cuda] [--only TEXT].

Features come as from a cache, so there is no encoder. On an accelerator the models have their released sizes
and clips 49 x 480 x 720; figures are the allocator's, and so is whether a setting keeps within its limit. On
the CPU they are reduced, and the figure is resident memory; each setting has a process of its own. Beside
them, what the plan task predicts, which alone speaks of released sizes there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml

from benchmarks.harness import RESULTS, hardware, save_record, versions
from cvx_core import device as devices
from cvx_core import placing
from cvx_core.building import build
from cvx_core.interfaces import Condition, Features, ParamGroup, Parts
from cvx_core.placing import place
from cvx_core.random import Draws, keyed
from cvx_core.recipe import parse
from cvx_core.spec import Spec, resolve
from cvx_parallel.gradients import clip
from cvx_plugins.plan.figures import planned
from cvx_plugins.plan.live import dropped_gradients
from cvx_plugins.plan.passes import Sample
from cvx_plugins.tasks.train import diffusion_loss

VIDEO = {"frames": 49, "height": 480, "width": 720}
REDUCED: Mapping[str, Any] = {"num_layers": 8, "num_heads": 8, "text_dim": 512}
REDUCED_VIDEO = {"frames": 33, "height": 192, "width": 288}
STEPS = 2
"""The second has optimizer state from its start."""


@dataclass(frozen=True)
class Setting:
    """A model and its switches. limit: GB that it has to keep within at released size."""

    model: str
    lora: bool = False
    recompute: Mapping[str, Any] | None = None
    optimizer: Mapping[str, Any] = field(default_factory=lambda: {"use": "adamw"})
    limit: float | None = None

    @property
    def offloads(self) -> bool:
        """Whether something lies in host memory, which on the CPU is all there is."""
        return bool((self.recompute or {}).get("offload") or self.optimizer.get("offload"))

    def recipe(self, device: str, reduced: bool) -> str:
        """Return a recipe that trains it."""
        data: dict[str, Any] = {
            "device": device,
            "dtype": "bfloat16",
            "video": REDUCED_VIDEO if reduced else VIDEO,
            "predictor": {"use": f"cogvideox-{self.model}", **(REDUCED if reduced else {})},
            "scheduler": {"use": "ddim", "snr_shift": 3.0 if self.model == "2b" else 1.0},
            "loader": {"batch": 1},
            "optimizer": dict(self.optimizer),
            "task": {"use": "plan"},
        }
        if self.lora:
            data["adapter"] = {"use": "lora", "rank": 128, "alpha": 64}
        if self.recompute is not None:
            data["parallel"] = [{"use": "recompute", **self.recompute}]
        return yaml.safe_dump(data)


EIGHT, AWAY = {"use": "adamw-8bit"}, {"use": "adamw", "offload": True}
SETTINGS: Mapping[str, Setting] = {
    "5B LoRA": Setting("5b", lora=True),
    "5B LoRA, selective recompute": Setting("5b", lora=True, recompute={"mode": "selective"}),
    "5B LoRA, recompute": Setting("5b", lora=True, recompute={}),
    "5B LoRA, recompute offload": Setting("5b", lora=True, recompute={"offload": True}, limit=19),
    "2B LoRA, recompute": Setting("2b", lora=True, recompute={}, limit=12),
    "2B full, recompute": Setting("2b", recompute={}),
    "2B full, recompute offload, 8-bit": Setting("2b", recompute={"offload": True}, optimizer=EIGHT),
    "2B full, all offload": Setting("2b", recompute={"offload": True}, optimizer=AWAY, limit=12),
    "5B full, recompute": Setting("5b", recompute={}),
    "5B full, recompute, 8-bit": Setting("5b", recompute={}, optimizer=EIGHT),
    "5B full, all offload": Setting("5b", recompute={"offload": True}, optimizer=AWAY, limit=24),
}


def predicted(setting: Setting, device: str, reduced: bool) -> dict[str, int]:
    """Return what the plan task says, bytes: the parts of the peak and the peak."""
    [stage] = planned(resolve(parse(setting.recipe(device, reduced)))).stages
    names = ("parameters", "gradients", "optimizer", "activations", "peak")
    return {name: getattr(stage, name) for name in names}


def measure(setting: Setting, device: str, reduced: bool) -> dict[str, Any]:
    """Train some steps in this process; return peaks in bytes, and the seconds of the last step.

    Resident memory is what comes on top of this process before the model is made.
    """
    if device == "cpu":
        torch.set_num_threads(1)
    spec = resolve(parse(setting.recipe(device, reduced)))
    before = _resident()
    with weights_of_no_use(device):
        parts = place(build(spec), spec)
    seconds = train(parts, spec)
    if device == "cpu":
        return {"resident": _resident() - before}
    found = {
        "allocated": int(torch.accelerator.max_memory_allocated()),
        "reserved": int(torch.accelerator.max_memory_reserved()),
        "step_s": seconds,
    }
    return {**found, "activations": activations(parts, spec)}


@contextmanager
def weights_of_no_use(device: str) -> Iterator[None]:
    """Within, weights on an accelerator are drawn there: by name, billions of them take the CPU minutes."""

    def draw(module: torch.nn.Module, *_rest: Any, **_options: Any) -> None:
        with torch.no_grad():
            for param in module.parameters():
                param.normal_(0, 0.02)

    usual = placing.initialise
    placing.initialise = draw if device != "cpu" else usual
    try:
        yield
    finally:
        placing.initialise = usual


def train(parts: Parts, spec: Spec) -> float:
    """Do some training steps on random features; return the seconds of the last one."""
    assert parts.make_optimizer is not None
    named = [(name, p) for name, p in parts.trained.named_parameters() if name in parts.trainable]
    optimizer = parts.make_optimizer([ParamGroup(named, {})])
    with_gradient = getattr(optimizer, "with_gradient", lambda param: param)
    parts.predictor.train()
    began = time.perf_counter()
    for number in range(STEPS):
        began = time.perf_counter()
        diffusion_loss(parts, _features(parts, spec), Draws(0, number, (0,), 0, 1))
        clip([with_gradient(p) for _, p in named], 1.0, parts.mesh)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        devices.synchronize(parts.device)
    return time.perf_counter() - began


def activations(parts: Parts, spec: Spec) -> dict[str, int]:
    """Return what an accelerator holds for activations, bytes: between both passes, and at most."""
    torch.accelerator.reset_peak_memory_stats()
    features = _features(parts, spec)
    timestep = torch.tensor([500], device=parts.device)
    target = torch.zeros_like(features.latent, dtype=torch.float32)
    before = torch.accelerator.memory_allocated()
    with dropped_gradients(parts.predictor):
        prediction = parts.predictor(features.latent, timestep, Condition(*features[1:]))
        loss = torch.nn.functional.mse_loss(prediction.float(), target)
        del prediction
        kept = torch.accelerator.memory_allocated() - before
        loss.backward()
    return {"kept": int(kept), "peak": int(torch.accelerator.max_memory_allocated() - before)}


def _features(parts: Parts, spec: Spec) -> Features:
    latent, condition = Sample(spec).latent(1, torch.bfloat16)
    generator = keyed(0, "benchmark")
    shapes = (latent.shape, condition.text_embeds.shape)
    drawn = [torch.randn(shape, generator=generator).bfloat16().to(parts.device) for shape in shapes]
    return Features(*drawn, torch.ones(condition.text_mask.shape, dtype=torch.bool, device=parts.device))


def _resident() -> int:
    """Return the most that was resident so far, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measured_apart(name: str, device: str, reduced: bool) -> dict[str, Any]:
    """Measure in a process of its own, whose C library returns larger blocks at once: resident means live."""
    command = [sys.executable, "-m", "benchmarks.memory", "--device", device, "--measure", name]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command += ["--reduced"] if reduced else []
    done = subprocess.run(
        command, cwd=RESULTS.parents[1], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(name: str, device: str, reduced: bool) -> dict[str, Any]:
    """Measure a setting and plan it; at released size too where it is measured reduced."""
    setting = SETTINGS[name]
    plan = predicted(setting, device, reduced)
    released = predicted(setting, device, False) if reduced else plan
    shows = device != "cpu" or not setting.offloads
    measured = measured_apart(name, device, reduced) if shows else None
    peak = released["peak"] if reduced or measured is None else measured["reserved"]
    return {
        "measured": measured,
        "predicted": plan,
        "released": released,
        "limit_gb": setting.limit,
        "within": None if setting.limit is None else peak <= setting.limit * 1e9,
    }


def table(record: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table in docs/benchmarks.md."""
    return _reduced_table(record) if record["reduced"] else _released_table(record)


def _reduced_table(record: Mapping[str, Any]) -> list[str]:
    lines = [
        "| | measured, MB | plan says, MB | at released size plan says, GB | limit |",
        "|---|---|---|---|---|",
    ]
    for name, found in record["settings"].items():
        seen = found["measured"]
        size = "-" if seen is None else f"{seen.get('resident', seen.get('allocated')) / 1e6:.0f}"
        peaks = f"{found['predicted']['peak'] / 1e6:.0f} | {found['released']['peak'] / 1e9:.2f}"
        lines.append(f"| {name} | {size} | {peaks} | {_limit(found)} |")
    return lines


def _released_table(record: Mapping[str, Any]) -> list[str]:
    lines = [
        "| | allocated, GB | reserved, GB | plan says | activations | plan says | s a step | limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in record["settings"].items():
        seen, plan = found["measured"], found["predicted"]
        pairs = (
            (seen["allocated"], seen["reserved"], plan["peak"]),
            (seen["activations"]["peak"], plan["activations"]),
        )
        cells = " | ".join(f"{size / 1e9:.2f}" for pair in pairs for size in pair)
        lines.append(f"| {name} | {cells} | {seen['step_s']:.1f} | {_limit(found)} |")
    return lines


def _limit(found: Mapping[str, Any]) -> str:
    """Return the cell that says whether a limit is kept."""
    if found["limit_gb"] is None:
        return ""
    return f"{found['limit_gb']:g}, {'kept' if found['within'] else 'missed'}"


def main(arguments: list[str] | None = None) -> int:
    """Print the table and write the record; returns 1 where a limit is missed."""
    options = _parser().parse_args(arguments)
    reduced = options.reduced or options.device == "cpu"
    if options.measure:
        print(json.dumps(measure(SETTINGS[options.measure], options.device, reduced)))
        return 0
    names = [name for name in SETTINGS if options.only in name]
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.memory", *sys.argv[1:]]),
        "hardware": {**hardware(options.device), "threads": 1},
        "versions": versions(),
        "reduced": {"predictor": REDUCED, "video": REDUCED_VIDEO} if reduced else None,
        "settings": {name: run(name, options.device, reduced) for name in names},
    }
    print("\n".join(table(record)))
    if not options.only:
        save_record(f"memory-{torch.device(options.device).type}", record)
    missed = [name for name, found in record["settings"].items() if found["within"] is False]
    for name in missed:
        print(f"{name}: over its limit", file=sys.stderr)
    return int(bool(missed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or npu")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="settings with TEXT in their name; not recorded"
    )
    parser.add_argument("--reduced", action="store_true", help="reduced sizes on an accelerator too")
    parser.add_argument("--measure", metavar="NAME", help="print one setting's peaks and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
