"""The tables of docs/benchmarks.md are those of the records."""

from benchmarks import tables


def test_the_tables_in_the_docs_are_those_of_the_records():
    page = tables.PAGE.read_text()
    assert tables.renewed(page) == page


def test_other_figures_are_written_in_place():
    page = tables.PAGE.read_text()
    assert tables.renewed(page.replace("| 5B LoRA, recompute |", "| another |")) == page
