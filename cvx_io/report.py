"""`python -m cvx_io.report RUN_DIR`: what a run left, as one HTML file that opens from disk."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cvx_core.errors import CvxError, FormatError, did_you_mean
from cvx_io.atomic import write_text
from cvx_io.record.environment import now
from cvx_io.record.files import read_run

NAME = "report.html"
EXAMPLES = """examples:
  cvx report runs/tiny                         writes runs/tiny/report.html
  cvx report runs/tiny --to tiny.html
  cvx report runs/demo --clips 100 --clip-mb 40
"""


def write_report(
    folder: Path, to: Path | None = None, clips: int | None = None, clip_mb: float | None = None
) -> Path:
    """Write the report of a run, which may still go on; return its path, by default in the run's folder.

    clips, clip_mb: how many clips, and how much of them, are put in at most. Raises FormatError where the
    folder is not that of a run.
    """
    from cvx_io.record.clips import Limits, pick
    from cvx_io.record.page import page

    usual = Limits()
    limits = Limits(
        usual.clips if clips is None else clips,
        usual.clip_bytes if clip_mb is None else int(clip_mb * 1e6),
    )
    run = read_run(folder)
    target = folder / NAME if to is None else to
    write_text(target, page(run, pick(run.clips, limits), now()))
    return target


def main(argv: Sequence[str] | None = None) -> int:
    """Write a report. Returns 0, or 2 after printing an error that the user can act on."""
    args = _parser().parse_args(argv)
    try:
        _check_folder(args.folder)
        print(write_report(args.folder, args.to, args.clips, args.clip_mb))
    except CvxError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{where}{error.strerror or error}. Check the path and its permissions.", file=sys.stderr)
        return 2
    return 0


def _check_folder(folder: Path) -> None:
    """Raise FormatError where there is no such folder, naming the nearest one beside it."""
    if not folder.is_dir():
        beside = [path for path in folder.parent.glob("*") if path.is_dir()]
        near = did_you_mean(folder.name, [path.name for path in beside])
        raise FormatError(
            f"{folder}: no such folder.{near} Give the folder that the recipe's `output` names."
        )


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def _megabytes(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cvx report",
        description="Write report.html of a run that is over, still goes on, or was killed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="RUN_DIR", type=Path, help="folder of a run")
    parser.add_argument(
        "--to", type=Path, metavar="FILE", help="where to write, instead of RUN_DIR/report.html"
    )
    parser.add_argument("--clips", type=_count, metavar="N", help="most clips to put in (24)")
    parser.add_argument("--clip-mb", type=_megabytes, metavar="MB", help="most megabytes of clips (16)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
