"""`cvx data`: look at the clips of a recipe, and turn other listings into data.jsonl."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cvx_core.errors import CvxError
from cvx_core.recipe import load
from cvx_core.spec import Spec, resolve

EXAMPLES = """examples:
  cvx data inspect recipe.yaml
  cvx data inspect recipe.yaml --set loader.buckets=bucket.yaml --jobs 4 --out report
  cvx data convert prompt.txt videos.txt data.jsonl
  cvx data convert captions.csv data.jsonl --field caption_column=text
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `cvx data VERB`. Returns 0; 1 where more clips are dropped than allowed; 2 after an error."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        code: int = args.call(args)
        return code
    except CvxError as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cvx data",
        description="Look at data before it is trained on.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    one = verbs.add_parser(
        "inspect", help="decode every clip of a recipe; say what training would do with it"
    )
    one.add_argument("recipe", help="path of a recipe; any task")
    one.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace one value of it"
    )
    one.add_argument("--out", type=Path, help="folder of inspection.csv and .html; by default <output>/data")
    one.add_argument("--jobs", type=int, default=2, help="processes that decode (2)")
    one.add_argument("--timeout", type=float, default=300, help="seconds that one file may take (300)")
    one.set_defaults(call=_inspect)
    one = verbs.add_parser("convert", help="turn a listing of clips into data.jsonl")
    one.add_argument("source", nargs="+", type=Path, help="prompt.txt videos.txt; or one file or folder")
    one.add_argument("target", type=Path, help="the file to write")
    one.add_argument("--from", dest="kind", metavar="DATASET", help="what reads the source, if not guessed")
    one.add_argument(
        "--field", action="append", default=[], metavar="KEY=TEXT", help="a field of that dataset"
    )
    one.add_argument("--skip-bad", action="store_true", help="leave out what is wrong, and say it")
    one.add_argument("--force", action="store_true", help="replace the target")
    one.set_defaults(call=_convert)
    return parser


def _inspect(args: argparse.Namespace) -> int:
    spec = resolve(load(args.recipe, args.set))
    if args.jobs < 1 or args.timeout <= 0:
        raise CvxError("--jobs and --timeout must be positive.")
    return report(spec, args.out or spec.output / "data", args.jobs, args.timeout)


def _convert(args: argparse.Namespace) -> int:
    from cvx_io.data_convert import guess, list_rows, write_jsonl

    if args.target.exists() and not args.force:
        raise CvxError(f"{args.target} exists. Name another file, or replace it by --force.")
    given = dict(text.partition("=")[::2] for text in args.field)
    if args.kind is None:
        kind, fields = guess(args.source)
    elif len(args.source) == 1:
        kind, fields = args.kind, {"path": args.source[0]}
    else:
        kind, fields = args.kind, dict(zip(("prompts", "videos"), args.source, strict=False))
    rows, bad = list_rows(kind, {**fields, **given}, args.skip_bad)
    write_jsonl(rows, args.target)
    for text in bad:
        print(f"left out: {text}")
    print(f"{args.target}: {len(rows)} rows of {kind}" + (f", {len(bad)} problems left out" if bad else ""))
    return 0


def report(spec: Spec, folder: Path, jobs: int, timeout_s: float) -> int:
    """Inspect a recipe's dataset, print the table and write CSV and HTML. Returns 1 where more clips are
    dropped than the recipe allows, else 0. Raises CvxError where the dataset has no clips.
    """
    from cvx_io.inspection import inspect
    from cvx_io.inspection_report import to_table, write

    if "dataset" not in spec.choices:
        raise CvxError("the recipe has no dataset. Add `dataset: {use: ...}`.")
    inspection = inspect(spec, jobs, timeout_s)
    print(to_table(inspection))
    print("\n".join(str(path) for path in write(inspection, folder)))
    if inspection.is_over:
        share = len(inspection.dropped) / len(inspection.findings)
        print(f"{share:.0%} are dropped; the recipe allows {inspection.max_drop:.0%}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
