"""Shell scripts read as text: variables, branches, loops, functions, and the commands they lead to.

Nothing is run. Of a branch the one whose condition holds is read; where a condition is not known, what the
branches set differently is not known after them. Of a loop the first value is taken, and said.
"""

from __future__ import annotations

from pathlib import Path

from cvx_core.errors import FormatError
from cvx_io.importing.shell_reader import LAUNCHERS, Command, End, Reader, Script
from cvx_io.importing.shell_text import StatementError, statements
from cvx_io.importing.shell_tree import tree
from cvx_io.importing.shell_values import Scope

__all__ = ["LAUNCHERS", "Command", "Script", "find_file", "launches", "read_script"]


def read_script(path: Path) -> Script:
    """Read a shell script. Raises FormatError where it cannot be read or a quote is not closed."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read: {error}. Give a shell script in UTF-8.") from error
    reader = Reader(Script(Scope(path)))
    try:
        reader.block(tree(statements(text)))
    except StatementError as error:
        raise FormatError(f"{path}:{error.line}: {error}. Is the script complete?") from error
    except ValueError as error:
        raise FormatError(f"{path}:{reader.line}: {error}. Is the script complete?") from error
    except RecursionError:
        raise FormatError(f"{path}:{reader.line}: is nested too deeply to be read. Is it a script?") from None
    except End:
        if not launches(reader.script):
            reader.script.scope.note(f"line {reader.line}: the script ends here, given no arguments")
    return reader.script


def launches(script: Script) -> list[Command]:
    """Return the commands that start a Python program."""
    return [command for command in script.commands if command.starts_python]


def find_file(name: str, script: Path) -> Path:
    """Return a file that a script names: from here, or from a folder above the script. Raises FormatError."""
    for folder in (Path(), *script.resolve().parents):
        if (folder / name).is_file():
            return folder / name
    raise FormatError(
        f"{script}: names {name}, which is neither here nor below a folder above the script. Put it there, "
        "or run this from the folder that the script is run from."
    )
