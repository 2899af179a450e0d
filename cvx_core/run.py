"""`python -m cvx_core.run recipe.yaml`: load, resolve, build, place, run - and nothing else."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace

from cvx_core.device import keep_freed_memory
from cvx_core.disk import in_words
from cvx_core.errors import CvxError, SaidError
from cvx_core.recipe import load
from cvx_core.registry import KINDS, Registry
from cvx_core.spec import WEIGHTED, Spec, resolve
from cvx_core.world import World

EXAMPLES = """examples:
  python -m cvx_core.run recipe.yaml
  python -m cvx_core.run recipe.yaml --set task.steps=100 --set optimizer.lr=1e-5
  python -m cvx_core.run recipe.yaml --check       say what is wrong, build nothing
  python -m cvx_core.run --list                    every component that is installed
  python -m cvx_core.run --list predictor
  python -m cvx_core.run --schema > cvx.schema.json   for completion in editors
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe. Returns 0, or 2 after printing an error that the user can act on."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except SaidError:
        return 2
    except CvxError as error:
        print(error, file=sys.stderr)
        return 2


def run(spec: Spec) -> None:
    """Build, place and run a spec: the library's form of the command."""
    from cvx_core import device
    from cvx_core.building import build
    from cvx_core.interfaces import Deps, Parts
    from cvx_core.joining import joined
    from cvx_core.placing import place

    if getattr(spec.config("task"), "ranks", None) is not None:
        spec.choices["task"].build(Deps(spec)).run(Parts(), spec)
        return
    world = World.stated()
    with joined(world, spec, device.pick(spec.run.device, world.local_rank)) as mark:
        parts = build(spec)
        if world.size == 1 and parts.dataset is not None:
            parts.dataset.rows()  # what is wrong with a listing shows before weights are read
        parts = replace(place(parts, spec), mark=mark)
        with in_words(spec.output):
            parts.task.run(parts, spec)


def _run(args: argparse.Namespace) -> int:
    if args.list is not None:
        print(listing(Registry.discover(), args.list or None))
        return 0
    if args.schema:
        from cvx_core.schema import schema

        print(json.dumps(schema(Registry.discover()), indent=1))
        return 0
    if args.recipe is None:
        raise CvxError("no recipe given. Try: python -m cvx_core.run recipe.yaml, or --help.")
    if args.world is not None and not args.check:
        raise CvxError(f"--world {args.world} goes with --check. A run has the processes that were started.")
    world = World.stated()
    spec = resolve(load(args.recipe, args.set), world=args.world if args.check else world.size)
    if args.check:
        print(report(spec, args.world))
        return 0
    level = logging.INFO if world.rank == 0 else logging.WARNING  # the first process speaks for all
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)
    logging.getLogger("cvx").info("%s", report(spec, world.size))
    keep_freed_memory()
    run(spec)
    return 0


def report(spec: Spec, world: int | None = None) -> str:
    """Return what a recipe resolves to, a line each. world: the number of processes, if known."""
    video = spec.video
    world = getattr(spec.config("task"), "ranks", None) or world
    lines = [f"{spec.recipe.source}: ok ({spec.digest})"]
    lines += [f"  {note}" for note in spec.notes]
    lines += [f"  {section}: random weights, from seed {spec.run.seed}" for section in _without_weights(spec)]
    chosen = ", ".join(f"{section} {choice.name}" for section, choice in spec.choices.items())
    lines.append(f"  {chosen}")
    if spec.loader.buckets is None:
        lines.append(f"  video {video.frames} frames of {video.height}x{video.width} at {video.fps:g} fps")
    else:
        table = spec.loader.buckets.items()
        frames = (f"{name} x {', '.join(map(str, counts))} frames" for name, counts in table)
        lines.append(f"  buckets {'; '.join(frames)}, at {video.fps:g} fps")
    if spec.parallel:
        names = ", ".join(choice.name for choice in spec.parallel)
        lines.append(f"  parallel {names}" + (f": {spec.mesh(world)}" if world else ""))
    lines.append(f"  output {spec.output}")
    return "\n".join(lines)


def _without_weights(spec: Spec) -> list[str]:
    """Return the sections of models that the task fills with random weights."""
    if getattr(spec.config("task"), "ranks", None) is not None:  # builds none
        return []
    models = {name: choice for name, choice in spec.choices.items() if name in WEIGHTED and name != "adapter"}
    return [name for name, choice in models.items() if choice.weights is None and name not in spec.unbuilt]


def listing(registry: Registry, kind: str | None) -> str:
    """Return the installed components, and the plugins that failed to load."""
    if kind is not None and kind not in KINDS:
        raise CvxError(f"no kind {kind!r}. Kinds: {', '.join(KINDS)}.")
    rows = [(c.kind, c.name, package, c.summary) for c, package in registry.all(kind)]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines = [
        "  ".join([*(text.ljust(w) for text, w in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]
    lines += [f"broken: plugin {f.plugin!r} of {f.package}: {f.error}" for f in registry.failures]
    return "\n".join(lines)


def _processes(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected the number of processes, 1 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cvx_core.run",
        description="Run a recipe: train, sample, evaluate.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="path of a recipe")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace one value of it"
    )
    parser.add_argument("--check", action="store_true", help="resolve and check the recipe, then stop")
    parser.add_argument(
        "--world", type=_processes, metavar="N", help="with --check: also check the mesh for N processes"
    )
    parser.add_argument(
        "--list", nargs="?", const="", metavar="KIND", help="list components, all or of one kind"
    )
    parser.add_argument("--schema", action="store_true", help="print a JSON Schema of recipes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
