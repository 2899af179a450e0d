"""Every strategy with every other: the cases, what each needs, and the table of them in docs/parallel.md."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from tests.distributed.harness import on_ranks
from tests.distributed.matrix import ROWS, VARIANTS, Step, check, recipe, run_step

PAGE = Path(__file__).resolve().parents[2] / "docs/parallel.md"
MARK = "<!-- matrix -->"


@dataclass(frozen=True)
class Choice:
    """One strategy of the matrix. owns: what no other of a case may own; ranks: along its axes.

    borrows: it needs ranks that see the same rows; encodes: it changes how features are made; adapter: it is
    one, not an entry of `parallel`; others: entries that cases take turns with.
    """

    entry: Mapping[str, Any]
    owns: str = ""
    ranks: int = 1
    borrows: bool = False
    encodes: bool = False
    adapter: bool = False
    others: tuple[Mapping[str, Any], ...] = ()


INTERLEAVED = {"use": "pp", "size": 2, "schedule": "interleaved"}
ZERO_BUBBLE = {"use": "pp", "size": 2, "schedule": "zero-bubble"}
SELECTIVE = {"use": "recompute", "mode": "selective"}
AWAY = {"use": "recompute", "every": 2, "offload": True}
CHOICES: Mapping[str, Choice] = {
    "ddp": Choice({"use": "ddp"}, "data", 2),
    "zero1": Choice({"use": "zero1"}, "data", 2),
    "zero2": Choice({"use": "zero2"}, "data", 2),
    "zero3": Choice({"use": "zero3"}, "data", 2),
    "layerzero": Choice({"use": "layerzero", "zero3_size": 2}, "data", 4),
    "tp": Choice({"use": "tp", "size": 2}, "tp", 2),
    "tp+sequence": Choice({"use": "tp", "size": 2, "sequence": True}, "tp", 2),
    "cp ulysses": Choice({"use": "cp", "ulysses": 2}, "cp", 2),
    "cp ring": Choice({"use": "cp", "ring": 2}, "cp", 2),
    "cp hybrid": Choice({"use": "cp", "ulysses": 2, "ring": 2}, "cp", 4),
    "pp": Choice({"use": "pp", "stages": [1, 3]}, "pp", 2, others=(INTERLEAVED, ZERO_BUBBLE)),
    "encoder-dp": Choice({"use": "encoder-dp"}, borrows=True, encodes=True),
    "vae-cp": Choice({"use": "vae-cp"}, borrows=True, encodes=True),
    "interleave": Choice({"use": "interleave", "rounds": 2}, encodes=True),
    "recompute": Choice({"use": "recompute"}, others=(SELECTIVE, AWAY)),
    "lora": Choice({"use": "lora", "rank": 2, "alpha": 3.0}, adapter=True),
    "compile": Choice({"use": "compile", "backend": "aot_eager"}),
}
TRIPLES = (
    ("layerzero", "tp", "cp ulysses"),
    ("zero3", "tp", "pp"),
    ("cp ulysses", "encoder-dp", "vae-cp"),
    ("layerzero", "pp", "encoder-dp"),
    ("zero3", "cp ring", "lora"),
)
PARTNER = "tp"
"""Gives ranks that see the same rows to strategies that borrow them, where no other does."""


@dataclass(frozen=True)
class Case:
    """Strategies to run together, by name."""

    names: tuple[str, ...]
    extra: tuple[str, ...] = field(default=())

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.names, *self.extra)

    @property
    def world(self) -> int:
        return math.prod(self.ranks(name) for name in self.all)

    def ranks(self, name: str) -> int:
        """Return the ranks of one strategy; see `entry`."""
        return 2 if self._is_crowded(name) else CHOICES[name].ranks

    def entry(self, name: str) -> Mapping[str, Any]:
        """Return what the recipe says of a strategy. Beside cp hybrid, layerzero's groups have one data rank
        each, which makes them as large as cp, since 16 processes are too many.
        """
        if self._is_crowded(name):
            return {**CHOICES[name].entry, "zero3_size": 1}
        entries = [CHOICES[name].entry, *CHOICES[name].others]
        if name == "pp" and {"recompute", "compile"} & set(self.all):
            entries.remove(ZERO_BUBBLE)  # it splits backward passes, and these do not let it
        return entries[self._turn % len(entries)]

    def _is_crowded(self, name: str) -> bool:
        return name == "layerzero" and "cp hybrid" in self.all

    @property
    def _turn(self) -> int:
        return sum(map(len, self.names))

    @property
    def variant(self) -> str:
        """Every variant has its share of the cases."""
        return list(VARIANTS)[self._turn % len(VARIANTS)]

    def text(self) -> str:
        """Return the recipe."""
        data = math.prod(self.ranks(name) for name in self.all if CHOICES[name].owns == "data")
        entries = {name: self.entry(name) for name in self.all}
        return _recipe(self.variant, entries, data, self.layers)

    @property
    def layers(self) -> int:
        """Blocks of the model: enough for every schedule of a pipeline."""
        return 4 if "pp" in self.all else 2


def cases() -> Iterator[Case]:
    """Yield each strategy alone, each pair that does not own the same axis, and the triples."""
    for name in CHOICES:
        yield _completed((name,))
    for pair in combinations(CHOICES, 2):
        owners = [CHOICES[name].owns for name in pair if CHOICES[name].owns]
        if len(set(owners)) == len(owners):
            yield _completed(pair)
    for triple in TRIPLES:
        yield _completed(triple)


def _completed(names: tuple[str, ...]) -> Case:
    borrows = any(CHOICES[name].borrows for name in names)
    has_group = any(CHOICES[name].owns in ("tp", "cp", "pp") for name in names)
    return Case(names, (PARTNER,) if borrows and not has_group else ())


def _recipe(variant: str, entries: Mapping[str, Mapping[str, Any]], data: int, layers: int) -> str:
    parallel = [dict(entry) for name, entry in entries.items() if not CHOICES[name].adapter]
    content = yaml.safe_load(recipe(variant, parallel, "float64", layers))
    content["loader"]["batch"] = ROWS // data
    for name, entry in entries.items():
        if CHOICES[name].adapter:
            content["adapter"] = dict(entry)
    return yaml.safe_dump(content)


@cache
def reference(variant: str, adapter: bool, encodes: bool, layers: int) -> Step:
    """Return what one process does."""
    entries = {name: choice.entry for name, choice in CHOICES.items() if choice.adapter and adapter}
    return run_step(_recipe(variant, entries, 1, layers), encoded=encodes)


def verify(case: Case) -> None:
    """Run a case on its ranks; AssertionError where loss, a gradient, an update or a name differs."""
    adapter = any(CHOICES[name].adapter for name in case.all)
    encodes = any(CHOICES[name].encodes for name in case.all)
    ranks = on_ranks(case.world, run_step, case.text(), 2, encodes)
    check(ranks, reference(case.variant, adapter, encodes, case.layers), "float64")


def table(results: Mapping[tuple[str, ...], str]) -> str:
    """Return the matrix as Markdown: the world each pair was run on, or what it gave."""
    names = list(CHOICES)
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in names:
        cells = [results.get((row,) if row == column else _ordered(row, column), "-") for column in names]
        lines.append(f"| **{row}** | " + " | ".join(cells) + " |")
    triples = [f"- {' x '.join(triple)}: {results.get(triple, '-')}" for triple in TRIPLES]
    return "\n".join([*lines, "", *triples])


def _ordered(one: str, other: str) -> tuple[str, str]:
    names = list(CHOICES)
    return (one, other) if names.index(one) < names.index(other) else (other, one)


def write(results: Mapping[tuple[str, ...], str]) -> None:
    """Put the table behind the mark of the page."""
    before = PAGE.read_text(encoding="utf-8").split(MARK)[0]
    PAGE.write_text(f"{before}{MARK}\n\n{table(results)}\n", encoding="utf-8")
