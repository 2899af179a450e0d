"""The `plan` task: figures on the log and in plan.json, and what would make the run fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from cvx_core.interfaces import Parts
from cvx_core.spec import Spec
from cvx_io.atomic import write_json
from cvx_plugins.plan import PlanConfig
from cvx_plugins.plan.buckets import of_each
from cvx_plugins.plan.figures import Figures, Planned, plain, planned
from cvx_plugins.plan.switches import Change, changes

log = logging.getLogger("cvx")
COLUMNS = (
    "parameters",
    "gradients",
    "optimizer",
    "average",
    "gathered",
    "activations",
    "encoders",
    "encoding",
    "peak",
)


class PlanTask:
    """Plans; builds nothing but shapes."""

    def __init__(self, config: PlanConfig, _deps: Any):
        self._config = config

    def prepare(self, parts: Parts, spec: Spec) -> Parts:
        """Return the parts as they are: nothing runs."""
        return parts

    def run(self, parts: Parts, spec: Spec) -> None:
        """Write <output>/plan.json and log the same."""
        config, specs = self._config, of_each(spec)
        results = {name: planned(one) for name, one in specs.items()}
        fullest = max(results, key=lambda name: results[name].peak)
        spec, result = specs[fullest], results[fullest]
        data = plain(result)
        for line in by_bucket(results, fullest) + table(result):
            log.info("%s", line)
        if fullest:
            data |= {"bucket": fullest, "buckets": {name: brief(one) for name, one in results.items()}}
        if config.memory_gb is not None:
            fits = result.peak <= config.memory_gb * 1e9
            found = [] if fits else changes(spec, result)
            data |= {"fits": fits, "changes": [change.plain() for change in found]}
            for line in verdict(result, config.memory_gb, found):
                log.info("%s", line)
        spec.output.mkdir(parents=True, exist_ok=True)
        write_json(spec.output / "plan.json", data)
        log.info("saved %s", spec.output / "plan.json")


def brief(result: Planned) -> dict[str, Any]:
    """Return the figures of a bucket that are compared with those of others."""
    seconds = result.seconds["step"] if result.seconds is not None else None
    return {"peak": result.peak, "rows": result.rows, "step": seconds}


def by_bucket(results: Mapping[str, Planned], fullest: str) -> list[str]:
    """Return a line for each bucket, and which of them the rest is about; nothing where there are none."""
    if list(results) == [""]:
        return []
    lines = []
    for name, result in results.items():
        takes = f", a step takes {result.seconds['step']:.2f} s" if result.seconds is not None else ""
        lines.append(f"bucket {name}: {result.rows} rows a step, {_gb(result.peak)} GB{takes}")
    return [*lines, f"of bucket {fullest}, which takes most memory:"]


def table(result: Planned) -> list[str]:
    """Return figures as lines; a line for each place along pp, the fullest rank's."""
    head = ["stage", "blocks", *COLUMNS]
    rows = [head, *(_row(stage) for stage in result.stages)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [f"{result.mesh}; {result.rows} rows a step; GB of the fullest rank"]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for stage in result.stages:
        sent = ", ".join(f"{axis} {_gb(count)}" for axis, count in stage.exchange.items()) or "nothing"
        lines.append(f"stage {stage.place}: sends, GB a step: {sent}; {stage.flops / 1e12:.0f}e12 operations")
    if result.seconds is not None:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in result.seconds.items() if name != "step")
        lines.append(f"a step takes {result.seconds['step']:.2f} s: {parts}")
    return [*lines, *result.notes]


def _row(stage: Figures) -> list[str]:
    return [str(stage.place), str(stage.blocks), *(_gb(getattr(stage, name)) for name in COLUMNS)]


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


def verdict(result: Planned, memory_gb: float, found: Sequence[Change]) -> list[str]:
    """Return whether it fits, and if not, what would make it."""
    if result.peak <= memory_gb * 1e9:
        return [f"fits: {_gb(result.peak)} of {memory_gb:g} GB"]
    hope = "Cheapest changes first:" if any(change.fits for change in found) else "No change tried makes it:"
    lines = [f"does not fit: {_gb(result.peak)} GB, a device has {memory_gb:g}. {hope}"]
    for change in found:
        fits = "fits" if change.fits else "does not fit"
        names = " and ".join(change.names)
        lines.append(f"  {names}: {_gb(change.peak)} GB, {fits}; a row costs {change.cost:.2f} times as much")
    return lines
