"""The account of a conversion: every tensor of the source and of the target is in it. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cvx_core.interfaces import TensorInfo
from cvx_io.progress import size_text
from cvx_io.tensors.dtypes import num_bytes

SHOWN = 6
"""How many dropped or invented tensors the text lists."""


@dataclass(frozen=True)
class End:
    """Where weights come from or go to."""

    path: Path
    format: str
    settings: Mapping[str, Any]
    index: Mapping[str, TensorInfo]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(num_bytes(info) for info in self.index.values())


@dataclass(frozen=True)
class Report:
    """What a conversion does with each tensor.

    consumed: {canonical name: names in the source}; dropped: {name: why}; invented: {canonical name: how};
    changed: {"float32 -> bfloat16": count}; assumed: {field of the model: why}; notes: for the user.
    """

    source: End
    target: End
    model: str
    evidence: str
    fields: Mapping[str, Any]
    consumed: Mapping[str, Sequence[str]]
    dropped: Mapping[str, str] = field(default_factory=dict)
    invented: Mapping[str, str] = field(default_factory=dict)
    changed: Mapping[str, int] = field(default_factory=dict)
    assumed: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    checked: Sequence[str] = ()

    def text(self) -> str:
        """Return the report for people."""
        lines = [
            f"{self.source.path} ({self.source.format}) -> {self.target.path} ({_settings(self.target)})",
            f"  model    {self.model}" + (f", known by its {self.evidence}" if self.evidence else ""),
            f"  read     {_summary(self.source)}",
            f"  write    {_summary(self.target)}",
        ]
        lines += [f"  changed  {count} tensors {change}" for change, count in self.changed.items()]
        lines += _listed("dropped", self.dropped)
        lines += _listed("invented", self.invented)
        lines += [f"  assumed  {name}: {why}" for name, why in self.assumed.items()]
        lines += [f"  note     {note}" for note in self.notes]
        lines += [f"  checked  {check}" for check in self.checked]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the whole report as plain values."""
        return {
            "cvx": _version(),
            "source": _end(self.source),
            "target": _end(self.target),
            "model": {"name": self.model, "evidence": self.evidence, "fields": dict(self.fields)},
            "consumed": {name: list(names) for name, names in self.consumed.items()},
            "dropped": dict(self.dropped),
            "invented": dict(self.invented),
            "missing": [],
            "changed": dict(self.changed),
            "assumed": dict(self.assumed),
            "notes": list(self.notes),
            "checked": list(self.checked),
        }


def _end(end: End) -> dict[str, Any]:
    return {
        "path": str(end.path),
        "format": end.format,
        "settings": dict(end.settings),
        "tensors": len(end.index),
        "bytes": end.size,
    }


def _settings(end: End) -> str:
    return ", ".join([end.format, *(f"{name}={value}" for name, value in end.settings.items())])


def _summary(end: End) -> str:
    counts = Counter(info.dtype for info in end.index.values())
    one = len(counts) == 1
    dtypes = ", ".join(dtype if one else f"{count} {dtype}" for dtype, count in counts.most_common())
    return f"{len(end.index)} tensors, {size_text(end.size)} ({dtypes})"


def _listed(what: str, names: Mapping[str, str]) -> list[str]:
    if not names:
        return []
    reasons: dict[str, list[str]] = {}
    for name, reason in names.items():
        reasons.setdefault(reason, []).append(name)
    lines = []
    for reason, group in reasons.items():
        more = f" and {len(group) - SHOWN} more" if len(group) > SHOWN else ""
        lines.append(f"  {what:<8} {', '.join(group[:SHOWN])}{more}: {reason}")
    return lines


def _version() -> str:
    try:
        return version("cvx")
    except PackageNotFoundError:
        return "unknown"
