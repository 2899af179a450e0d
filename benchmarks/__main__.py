"""Run the benchmarks and print one line per case: python -m benchmarks [--device cpu] [--cases TEXT]."""

from __future__ import annotations

import argparse
import json
import pkgutil
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import benchmarks
from benchmarks import harness
from benchmarks.harness import Case, Comparison, Size


def main(arguments: list[str] | None = None) -> int:
    """Return 1 where a case's two sides disagree or no case has the wanted name, else 0."""
    options = _parser().parse_args(arguments)
    if options.peak:
        name, side = options.peak
        case = next(case for case in _cases("cpu", options.size) if case.name == name)
        print(json.dumps(harness.resident_peak(case.build(side))))
        return 0
    chosen = [case for case in _cases(options.device, options.size) if options.cases in case.name]
    if not chosen:
        known = ", ".join(case.name for case in _cases(options.device, options.size))
        print(f"no case with {options.cases!r} in its name. Known: {known}.", file=sys.stderr)
        return 1
    agree = True
    for case in chosen:
        result = _run(case, options)
        print(result, flush=True)
        harness.save(result, options.size, options.json)
        if result.difference is not None and not result.difference <= case.tolerance:
            agree = False
            print(
                f"  outputs differ by {result.difference:.2e}; at most {case.tolerance:.0e} is allowed",
                file=sys.stderr,
            )
    return 0 if agree else 1


def _run(case: Case, options: argparse.Namespace) -> Comparison:
    ours, theirs = case.build("ours"), case.build("theirs")
    result = harness.compare(case.name, ours, theirs, device=options.device, repeats=options.repeats)
    del ours, theirs
    if options.device != "cpu" or options.no_memory:
        return result
    size: Size = options.size
    ours_peak = harness.peak_of_child(case.name, "ours", size)
    theirs_peak = harness.peak_of_child(case.name, "theirs", size)
    return harness.with_peaks(result, {"ours": ours_peak, "theirs": theirs_peak})


def _cases(device: str, size: Size) -> Iterable[Case]:
    names = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("__"))
    for module in (import_module(f"benchmarks.{name}") for name in names):
        if hasattr(module, "cases"):
            yield from module.cases(device, size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure against diffusers.")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or npu")
    parser.add_argument("--cases", default="", metavar="TEXT", help="only cases with TEXT in their name")
    parser.add_argument("--size", default="small", choices=("small", "full"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory on the CPU")
    parser.add_argument(
        "--json", type=Path, default=harness.RESULTS, metavar="DIR", help="folder of the records"
    )
    parser.add_argument(
        "--peak", nargs=2, metavar=("CASE", "SIDE"), help="print one side's peak memory and stop"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
