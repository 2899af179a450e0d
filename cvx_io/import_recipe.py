"""`python -m cvx_io.import_recipe SOURCE`: a training script or config of another project, as a recipe."""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cvx_core.errors import CvxError, FormatError, did_you_mean
from cvx_io.atomic import write_text
from cvx_io.importing import shell
from cvx_io.importing.draft import Draft, flags_of, rebase
from cvx_io.importing.factory import import_factory
from cvx_io.importing.launcher import STARTING, Launch, check_unknown, launch_of
from cvx_io.importing.mindone import import_mindone
from cvx_io.importing.mindspeed import import_mindspeed

EXAMPLES = """examples:
  cvx import-recipe train_text_to_video_lora.sh recipe.yaml --weights weights
  cvx import-recipe examples/cogvideox/t2v_1.5/pretrain_cogvideox_t2v_1.5.sh recipe.yaml
  cvx import-recipe train_t2v.yaml recipe.yaml --also csv_path=clips.csv --also train_steps=2000
  cvx check recipe.yaml
"""


_OTHER = re.compile(r"infer|sample|eval|prepare|feature|convert")
"""What programs are named for that do not train."""


def import_recipe(source: Path, weights: Path, also: Sequence[str] = ()) -> Draft:
    """Return the recipe of a training script or yaml, with the account of every setting. Nothing is run.

    weights: folder in which released models lie by name; also: "name=value" settings, over the source's own.
    Raises FormatError where the source cannot be read, or states what has no recipe.
    """
    draft = (
        _of_yaml(source, also) if source.suffix in (".yaml", ".yml") else _of_script(source, weights, also)
    )
    draft.close()
    return draft


def _of_yaml(
    source: Path,
    also: Sequence[str],
    flags: dict[str, Any] | None = None,
    launch: Launch | None = None,
) -> Draft:
    """Read a MindOne yaml, with what a command line sets over it."""
    try:
        data = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FormatError(f"{source}: cannot be read as YAML: {error}. Give a training config.") from error
    if not isinstance(data, dict) or "model_version" not in data:
        raise FormatError(f"{source}: is no training config of MindOne, which states model_version.")
    draft = Draft(str(source), {**data, **(flags or {}), **_settings(also)})
    import_mindone(draft, _rows(draft.given.get("csv_path")), launch)
    return draft


def _of_script(source: Path, weights: Path, also: Sequence[str]) -> Draft:
    """Read the one training command of a script."""
    script = shell.read_script(source)
    command = _training_command(source, script)
    place = next(i for i, word in enumerate(command.words) if word.endswith(".py"))
    program, where = Path(command.words[place]).name, f"{source}:{command.line}"
    if (other := _OTHER.search(program)) is not None:
        raise FormatError(f"{where}: {program} does not train ({other[0]}). Give the script of a training.")
    stated = _settings(also, "--")
    launcher = flags_of(_after_verb(command.words[:place]))
    launch = launch_of(command, launcher, source, where)
    for name in [name for name in stated if name in STARTING]:
        launch.flags[name] = stated.pop(name)
    given = {**flags_of(command.words[place + 1 :]), **stated}
    draft = Draft(where, given, notes=list(script.notes))
    draft.notes += check_unknown(command, script, where, set(stated), place)
    if "--mm-model" in given:
        import_mindspeed(draft, source, launch)
    elif "--config" in given:
        path = shell.find_file(str(given.pop("--config")), source)
        flags = {name.removeprefix("--"): value for name, value in given.items()}
        inner = _of_yaml(path, (), flags, launch)
        inner.notes = [*draft.notes, *inner.notes]
        return inner
    elif "--pretrained_model_name_or_path" in given:
        import_factory(draft, program, launch, source, weights)
    else:
        raise FormatError(
            f"{draft.source}: {program} gives neither --pretrained_model_name_or_path (CogVideoX-factory), "
            "--mm-model (MindSpeed-MM) nor --config (MindOne). Give a script of one of these."
        )
    return draft


def _training_command(source: Path, script: shell.Script) -> shell.Command:
    """Return the command that trains: the first, where it does not depend on what is not known which is."""
    found = shell.launches(script)
    if not found:
        functions = [
            f"the function {name} (line {line}) is called nowhere" for name, line in script.uncalled.items()
        ]
        why = "".join(f" {note}." for note in [*script.notes, *functions])
        raise FormatError(
            f"{source}: starts no Python program with {', '.join(shell.LAUNCHERS)}.{why}{_unclear(script)} "
            "Give one that trains."
        )
    command = found[0]
    others = ", ".join(str(other.line) for other in found[1:])
    if others and command.condition:
        raise FormatError(
            f"{source}:{command.line}: {len(found)} commands train (lines {command.line}, {others}), and "
            f"which one depends on {command.condition}, which is not known from the text. Keep one in a "
            "copy of it."
        )
    if others:
        script.scope.note(f"of {len(found)} commands that train, the one at line {command.line} is taken")
    elif command.condition:
        script.scope.note(
            f"line {command.line}: the command is taken to run, whatever {command.condition} gives"
        )
    return command


def _unclear(script: shell.Script) -> str:
    """Return which commands would start a program with what is not known."""
    found = [
        f" Line {one.line}: {one.words[0]} is not known from the text; set it in a copy of the script."
        for one in script.commands
        if 0 in one.unknown and any(word.endswith(".py") for word in one.words)
    ]
    return "".join(found)


def _after_verb(words: Sequence[str]) -> list[str]:
    """Return a launcher's flags: what follows `accelerate launch`, `torchrun`, `python -m torch...`."""
    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    return [word for word in words[first:] if not word.endswith(".py")]


def _settings(also: Sequence[str], prefix: str = "") -> dict[str, Any]:
    found = {}
    for text in also:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise FormatError(f"--also {text}: expected NAME=VALUE, as the source would name it.")
        found[f"{prefix}{name.removeprefix('--')}"] = value
    return found


def _rows(table: Any) -> int | None:
    """Return the number of rows of a csv file, None where it is not at hand."""
    try:
        with Path(str(table)).open(newline="", encoding="utf-8") as file:
            return sum(1 for _ in csv.DictReader(file))
    except OSError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Import. Returns 0, or 2 after printing an error that the user can act on."""
    args = _parser().parse_args(argv)
    try:
        if not args.source.is_file():
            near = did_you_mean(args.source.name, [path.name for path in args.source.parent.glob("*")])
            raise FormatError(f"{args.source}: no such file.{near} Give a script or a yaml.")
        if args.target.exists() and not args.overwrite:
            raise FormatError(f"{args.target}: is there already. Add --overwrite to replace it.")
        draft = import_recipe(args.source, args.weights, args.also)
        rebase(draft.recipe, args.target.parent)
        write_text(args.target, draft.text())
    except CvxError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{where}{error.strerror or error}. Check the path and its permissions.", file=sys.stderr)
        return 2
    print("\n".join([*draft.account(), f"written to {args.target}; next: cvx check {args.target}"]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cvx import-recipe",
        description="Write the recipe of a training script of CogVideoX-factory, MindSpeed-MM or MindOne.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="train.sh, or a yaml of MindOne; it is read, never run")
    parser.add_argument("target", type=Path, help="recipe to write")
    parser.add_argument(
        "--weights",
        type=Path,
        default=Path("weights"),
        metavar="FOLDER",
        help="where released models are (weights)",
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the source, over its own",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the target")
    return parser


if __name__ == "__main__":
    sys.exit(main())
