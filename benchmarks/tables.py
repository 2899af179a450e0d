"""Write the tables of docs/benchmarks.md anew from the records: python -m benchmarks.tables."""

from __future__ import annotations

import json
from importlib import import_module
from itertools import takewhile
from pathlib import Path

from benchmarks.harness import RESULTS

PAGE = Path(__file__).resolve().parents[1] / "docs/benchmarks.md"
RECORDS = {name: f"{name}-cpu" for name in ("loader", "memory", "decode", "overhead")}
RECORDS["parallel"] = "parallel"
"""{module with a `table`: its record}"""


def tables() -> dict[str, list[str]]:
    """Return the lines of each table; the first, its head, is not another's."""
    found = {}
    for module, record in RECORDS.items():
        text = (RESULTS / f"{record}.json").read_text(encoding="utf-8")
        found[module] = import_module(f"benchmarks.{module}").table(json.loads(text))
    return found


def renewed(page: str) -> str:
    """Return a page with every table as the records have it. Raises ValueError where one's head is absent."""
    lines = page.splitlines()
    for table in tables().values():
        start = lines.index(table[0])
        count = len(list(takewhile(lambda line: line.startswith("|"), lines[start:])))
        lines[start : start + count] = table
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
