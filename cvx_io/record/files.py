"""What a run left in its folder, read so that a cut-off or missing file costs itself only."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cvx_core.errors import FormatError
from cvx_io.record.curves import Curve

ENVIRONMENT, PLUGINS, DATA, RECIPE = "environment.json", "plugins.json", "data.json", "recipe.resolved.yaml"
GIVEN = "given"
"""Folder of clips as the model was given them."""
VALIDATION, BAND = "validation", "validation/loss_band_"
"""Folder of the videos of validations, and how the keys of their losses per band begin."""
NOT_CLIPS = ("checkpoints", "model", "tensorboard", VALIDATION, "wandb")
KNOWN: Mapping[str, tuple[str, str, bool]] = {
    "loss": ("Loss", "", True),
    "validation/loss": ("Held-out loss", "", True),
    "validation/failed": ("What went wrong in validations", "", False),
    "lr": ("Learning rate", "", False),
    "grad_norm": ("Gradient norm before clipping", "", True),
    "rows_per_second": ("Throughput", "rows per second", False),
    "peak_memory_gb": ("Peak memory", "GB", False),
    "seconds": ("Time of the last logged step", "s", True),
}
"""Quantities in order of appearance: title, unit, whether a logarithmic axis may be used."""


@dataclass(frozen=True)
class Run:
    """A run's folder. starts: one mapping per start of the run; faults: what could not be read, and why."""

    folder: Path
    recipe: Mapping[str, Any]
    starts: tuple[Mapping[str, Any], ...]
    plugins: tuple[Mapping[str, Any], ...]
    data: Mapping[str, Any]
    weights: Mapping[str, Any]
    curves: tuple[Curve, ...]
    last_step: int
    clips: tuple[Path, ...]
    faults: tuple[str, ...]


def read_run(folder: Path) -> Run:
    """Read a run's folder. Raises FormatError where it is none: no recipe, no log and no clip in it."""
    faults: list[str] = []
    clips = tuple(find_clips(folder))
    rows = {name: list(_lines(folder / f"{name}.jsonl", faults)) for name in ("log", "speed")}
    if not any((clips, rows["log"], (folder / RECIPE).exists())):
        raise FormatError(
            f"{folder}: is no folder of a run: it has no {RECIPE}, no log.jsonl and no mp4. "
            "Give the folder that the recipe's `output` names."
        )
    return Run(
        folder=folder,
        recipe=_yaml(folder / RECIPE, faults),
        starts=tuple(read_object(folder / ENVIRONMENT, faults).get("starts", ())),
        plugins=tuple(read_object(folder / PLUGINS, faults).get("plugins", ())),
        data=read_object(folder / DATA, faults),
        weights=read_object(folder / "weights.json", faults),
        curves=(*_curves(rows["log"]), *_curves(rows["speed"])),
        last_step=max((row["step"] for row in rows["log"]), default=0),
        clips=clips,
        faults=tuple(faults),
    )


def find_clips(folder: Path) -> Iterator[Path]:
    """Yield the mp4 files of a run, those of the newest folder first, by name within one folder.

    Of validations only the last one's is among them, with all its videos side by side, before all else.
    """
    yield from sorted((folder / VALIDATION).glob("step-*.mp4"), key=lambda path: (len(path.name), path.name))[
        -1:
    ]
    found: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("*.mp4")):
        inner = path.relative_to(folder).parts
        if inner[0] not in NOT_CLIPS and not any(part.startswith(".") for part in inner):
            found.setdefault(path.parent, []).append(path)
    newest = {parent: max(path.stat().st_mtime for path in paths) for parent, paths in found.items()}
    for parent in sorted(found, key=lambda parent: (parent.name == GIVEN, -newest[parent], parent)):
        yield from found[parent]


def _curves(rows: list[dict[str, Any]]) -> Iterator[Curve]:
    """Yield a curve for every number that was logged, those that are known first."""
    keys = dict.fromkeys(key for row in rows for key in row if key != "step")
    for key in sorted(keys, key=lambda key: list(KNOWN).index(key) if key in KNOWN else len(KNOWN)):
        points = [(row["step"], row[key]) for row in rows if _is_number(row.get(key))]
        if points:
            title, unit, may_be_log = KNOWN.get(key, (_title(key, keys), "", True))
            steps, values = zip(*points, strict=True)
            yield Curve(key, title, unit, steps, tuple(map(float, values)), may_be_log)


def _title(key: str, keys: Collection[str]) -> str:
    """Return what a quantity without a title of its own is called: a band by its timesteps."""
    number = key.removeprefix(BAND)
    if number == key or not number.isdigit():
        return key
    count = sum(other.startswith(BAND) for other in keys)
    low, high = (1000 * (int(number) + i) // count for i in (0, 1))
    return f"Held-out loss, timesteps {low} to {high - 1}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _lines(path: Path, faults: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a log in order of steps; a line that is none is counted as a fault."""
    text = _text(path, faults)
    bad = 0
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            bad += 1
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row
        else:
            bad += 1
    if bad:
        faults.append(f"{path.name}: {bad} lines cannot be read, as after a crash while one was written")


def read_object(path: Path, faults: list[str]) -> dict[str, Any]:
    """Return the object of a JSON file, {} where there is none; `faults` is told why it cannot be read."""
    text = _text(path, faults)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        faults.append(f"{path.name}: is not JSON: {error}")
        return {}
    if not isinstance(value, dict):
        faults.append(f"{path.name}: holds no JSON object")
        return {}
    return value


def _yaml(path: Path, faults: list[str]) -> dict[str, Any]:
    text = _text(path, faults)
    try:
        value = yaml.safe_load(text) if text else {}
    except yaml.YAMLError as error:
        faults.append(f"{path.name}: is not YAML: {str(error).splitlines()[0]}")
        return {}
    return value if isinstance(value, dict) else {}


def _text(path: Path, faults: list[str]) -> str:
    """Return a file's text, "" where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{path.name}: cannot be read: {error}")
        return ""
