"""Before ranks form a group: each states where and what it is, and what has to be the same must be.

All of it goes through the launcher's key-value store, so that a rank which never comes can be named.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from typing import TYPE_CHECKING, Any

from cvx_core.errors import CvxError, SaidError
from cvx_core.registry import Registry
from cvx_core.spec import Spec
from cvx_core.world import World

if TYPE_CHECKING:
    import torch

PERSONAL = ("rank", "host", "pid", "device")
POLL_S = 0.05
LATER_S = 10.0
"""By how much the others wait longer than the first, whose message says more."""
log = logging.getLogger("cvx")


@dataclass(frozen=True)
class Facts:
    """What one rank states. All but its rank, host, process and device must be the same on every rank."""

    rank: int
    host: str
    pid: int
    device: str
    python: str
    torch: str
    cvx: str
    registry: str
    recipe: str
    data: str


def facts(spec: Spec, world: World, device: torch.device) -> Facts:
    """Return what this rank has to state; a data set that cannot be listed here is stated as its error."""
    import torch

    return Facts(
        rank=world.rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        device=str(device),
        python=platform.python_version(),
        torch=torch.__version__,
        cvx=metadata.version("cvx"),
        registry=registry_digest(spec.registry),
        recipe=spec.digest,
        data=data_account(spec),
    )


def registry_digest(registry: Registry) -> str:
    """Return eight hex digits of all components that are installed: names, presets, packages, versions."""
    items = [
        (c.kind, c.name, c.target, repr(sorted(c.preset.items())), package)
        for c, package in registry.all(None)
    ]
    return _digest([sorted(items), sorted((name, _version(name)) for name in {item[-1] for item in items})])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def data_account(spec: Spec) -> str:
    """Return how many rows the recipe's data set lists, and eight hex digits of their names."""
    from cvx_core.interfaces import Deps

    if "dataset" not in spec.choices:
        return "none"
    try:
        rows = spec.choices["dataset"].build(Deps(spec)).rows()
    except CvxError as error:
        return str(error).replace("\n", " ")
    return f"{len(rows)} rows {_digest([row.id for row in rows])}"


def preflight(store: Any, mine: Facts, world: World, timeout_s: float) -> list[Facts]:
    """Return what every rank states, after the first one has compared it; printed there as a table.

    Raises CvxError naming ranks that do not come in time, or that differ.
    """
    store.set(f"facts/{mine.rank}", json.dumps(asdict(mine)))
    if mine.rank == 0:
        try:
            everyone = _gather(store, world, timeout_s)
            log.info("%s", table(everyone))
            check(everyone)
        except CvxError as error:
            print(error, file=sys.stderr, flush=True)
            store.set("preflight", "refused")
            raise SaidError(str(error)) from error
        store.set("preflight", json.dumps([asdict(one) for one in everyone]))
        return everyone
    if not _wait(store, ["preflight"], timeout_s + LATER_S):
        raise CvxError(f"rank 0 did not start within {timeout_s:g} s. Look at the output there.")
    told = store.get("preflight").decode()
    if told == "refused":
        raise SaidError("the first rank has refused to start")
    return [Facts(**one) for one in json.loads(told)]


def _gather(store: Any, world: World, timeout_s: float) -> list[Facts]:
    names = [f"facts/{rank}" for rank in range(world.size)]
    if not _wait(store, names, timeout_s):
        missing = [rank for rank, name in enumerate(names) if not store.check([name])]
        raise CvxError(
            f"{ranks_text(missing)} of {world.size} did not start within {timeout_s:g} s. Look at the output "
            "there; the recipe's timeout_s says how long the others wait."
        )
    return [Facts(**json.loads(value)) for value in store.multi_get(names)]


def _wait(store: Any, names: Sequence[str], timeout_s: float) -> bool:
    """Wait for keys; returns whether all came in time."""
    end = time.monotonic() + timeout_s
    while not store.check(list(names)):
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True


def differences(everyone: Sequence[Facts]) -> list[str]:
    """Return a line for each thing that should be the same and is not, naming the ranks that differ."""
    lines = []
    for name in (item.name for item in fields(Facts) if item.name not in PERSONAL):
        ranks: dict[str, list[int]] = {}
        for one in everyone:
            ranks.setdefault(getattr(one, name), []).append(one.rank)
        if len(ranks) > 1:
            most = max(ranks, key=lambda value: (len(ranks[value]), -ranks[value][0]))
            others = [f"{value!r} on {ranks_text(who)}" for value, who in ranks.items() if value != most]
            lines.append(f"{name}: {most!r} on {ranks_text(ranks[most])}, but {', '.join(others)}")
    return lines


def table(everyone: Sequence[Facts]) -> str:
    """Return a line per rank with what differs, and one with what all have in common."""
    differing = {line.split(":")[0] for line in differences(everyone)}
    columns = [item.name for item in fields(Facts) if item.name in (*PERSONAL, *differing)]
    rows = [columns, *([str(getattr(one, name)) for name in columns] for one in everyone)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    common = [
        f"{item.name} {getattr(everyone[0], item.name)}" for item in fields(Facts) if item.name not in columns
    ]
    return "\n".join([*lines, "all: " + ", ".join(common)])


def check(everyone: Sequence[Facts]) -> None:
    """Raise CvxError where ranks differ in what has to be the same."""
    found = differences(everyone)
    if found:
        raise CvxError(
            "the processes of this run are not alike, so nothing was started. "
            + "; ".join(found)
            + ". Install and mount the same everywhere."
        )


def ranks_text(numbers: Sequence[int]) -> str:
    """Return numbers for people: "ranks 0-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(numbers) > 1 else ''} {text}"


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]
