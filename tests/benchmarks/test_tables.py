"""The tables of docs/benchmarks.md are those of the records."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDS = {"memory": "memory-cpu", "decode": "decode-cpu", "overhead": "overhead-cpu"}


@pytest.mark.parametrize("name", RECORDS)
def test_a_table_in_the_docs_is_that_of_its_record(name):
    record = json.loads((ROOT / f"benchmarks/results/{RECORDS[name]}.json").read_text())
    table = "\n".join(importlib.import_module(f"benchmarks.{name}").table(record))
    assert table in (ROOT / "docs/benchmarks.md").read_text()
