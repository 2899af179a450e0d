"""The console script `cvx`: short verbs for the same calls as `python -m`."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from collections.abc import Callable, Sequence

from cvx_core import run
from cvx_core.errors import did_you_mean

EXAMPLES = """examples:
  cvx run recipe.yaml --set task.steps=100
  cvx check recipe.yaml
  cvx convert CogVideoX-2b-sat/transformer out/transformer --to hf
  cvx import-recipe train.sh recipe.yaml
  cvx report runs/tiny
  cvx plugins predictor
  cvx schema > cvx.schema.json
"""


def _check(argv: Sequence[str]) -> int:
    return run.main([*argv, "--check"])


def _plugins(argv: Sequence[str]) -> int:
    return run.main(["--list", *argv])


def _schema(argv: Sequence[str]) -> int:
    return run.main(["--schema", *argv])


def _convert(argv: Sequence[str]) -> int:
    # By name, as any component is: the core does not depend on the packages above it.
    code: int = importlib.import_module("cvx_io.convert").main(argv)
    return code


def _cache(argv: Sequence[str]) -> int:
    code: int = importlib.import_module("cvx_io.cache.__main__").main(argv)
    return code


def _import(argv: Sequence[str]) -> int:
    code: int = importlib.import_module("cvx_io.import_recipe").main(argv)
    return code


def _report(argv: Sequence[str]) -> int:
    code: int = importlib.import_module("cvx_io.report").main(argv)
    return code


def _data(argv: Sequence[str]) -> int:
    code: int = importlib.import_module("cvx_io.data").main(argv)
    return code


VERBS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "run": (run.main, "run a recipe"),
    "check": (_check, "resolve and check a recipe, build nothing"),
    "convert": (_convert, "convert weights from any format to any other"),
    "cache": (_cache, "look after a feature cache: verify, stats, prune"),
    "import-recipe": (_import, "write the recipe of a training script of another project"),
    "report": (_report, "write report.html of a run: curves, clips, data account"),
    "data": (_data, "look at the clips of a recipe, and convert listings of clips"),
    "plugins": (_plugins, "list the installed components, all or of one kind"),
    "schema": (_schema, "print a JSON Schema of recipes"),
}


def _reader_is_gone() -> bool:
    """Tell whether whoever read what is printed, such as head, has seen enough."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # 0: errors alone
    return bool(poll.poll(0))


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch a verb; everything after it goes to the verb. Returns its exit code, 2 for an unknown verb."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in VERBS:
        try:
            code = VERBS[argv[0]][0](argv[1:])
            sys.stdout.flush()
        except BrokenPipeError:
            if not _reader_is_gone():  # some other pipe, such as that of a worker
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 141
        return code
    verbs = "\n".join(f"  {name:15}{text}" for name, (_, text) in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="cvx",
        usage="cvx VERB ...",
        description=f"verbs:\n{verbs}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if argv and not argv[0].startswith("-"):
        print(f"cvx: no verb {argv[0]!r}.{did_you_mean(argv[0], VERBS)} See cvx --help.", file=sys.stderr)
        return 2
    parser.parse_args(argv)
    parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
