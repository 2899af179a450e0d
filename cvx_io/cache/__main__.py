"""`python -m cvx_io.cache verify|stats|prune DIR`: look after a feature cache."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cvx_core.errors import CvxError, FormatError
from cvx_io.cache import upkeep
from cvx_io.cache.claims import Claims
from cvx_io.progress import progress, size_text

EXAMPLES = """examples:
  cvx cache stats runs/cache
  cvx cache verify runs/cache            compare every item with its digest
  cvx cache verify runs/cache --remove   and remove the damaged ones, for precompute to make again
  cvx cache prune runs/cache --dry-run   what no list of rows refers to any more
  cvx cache prune runs/cache
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Returns 0; 1 where verify found damage; 2 after printing an error."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        code: int = args.run(args)
        return code
    except CvxError as error:
        print(error, file=sys.stderr)
        return 2


def _verify(args: argparse.Namespace) -> int:
    total = sum(upkeep.stats(args.folder).items.values())
    found = upkeep.Verified()
    with progress("verify", total) as bar:
        for found in upkeep.verify(args.folder):
            bar.step(by=min(1, total - found.items + 1))
    for path, why in found.damaged.items():
        print(why, file=sys.stderr)
        if args.remove:
            path.unlink()
    for path, name in found.missing.items():
        print(f"{path}: missing, though list {name!r} refers to it. Run precompute again.", file=sys.stderr)
    removed = " (removed)" if args.remove and found.damaged else ""
    print(f"{found.items} items, {len(found.damaged)} damaged{removed}, {len(found.missing)} missing")
    return 0 if found.is_whole else 1


def _stats(args: argparse.Namespace) -> int:
    found = upkeep.stats(args.folder)
    if args.json:
        print(json.dumps(asdict(found), indent=1))
        return 0
    for kind, count in found.items.items():
        print(f"{kind:<14}{count:>8} items  {size_text(found.size[kind]):>10}")
    for name, rows in found.rows.items():
        print(f"list {name!r}: {rows} rows")
    print(f"in no list: {found.unused} items, {size_text(found.unused_size)}")
    return 0


def _prune(args: argparse.Namespace) -> int:
    """Remove what is unused, unless a process is adding items, which no list has yet."""
    if not upkeep.names_in(args.folder) and not args.all:
        raise FormatError(
            f"{args.folder}: has no list of rows, so every item would go. Let precompute finish, or "
            "give --all."
        )
    claims = Claims(args.folder)
    if not claims.alone():
        raise FormatError(f"{args.folder}: a precompute run is adding items. Wait until it has finished.")
    found = upkeep.unused(args.folder)
    size = sum(path.stat().st_size for path in found)
    for path in found if not args.dry_run else ():
        path.unlink()
    claims.close()
    done = "would be removed (--dry-run)" if args.dry_run else "removed"
    print(f"{len(found)} files, {size_text(size)} {done}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cvx cache",
        description="Look after a feature cache: the output folder of the precompute task.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, run, text in (
        ("verify", _verify, "compare every item with its digest, every list with the items"),
        ("stats", _stats, "items, bytes and rows, and what no list refers to"),
        ("prune", _prune, "remove items that no list of rows refers to"),
    ):
        verb = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        verb.add_argument("folder", type=Path, metavar="DIR", help="the cache")
        verb.set_defaults(run=run)
        if name == "verify":
            verb.add_argument("--remove", action="store_true", help="remove damaged items")
        elif name == "stats":
            verb.add_argument("--json", action="store_true", help="print it as JSON")
        else:
            verb.add_argument("--dry-run", action="store_true", help="only say what would be removed")
            verb.add_argument("--all", action="store_true", help="also where there is no list of rows")
    return parser


if __name__ == "__main__":
    sys.exit(main())
