"""Shell scripts read as text: variables, arrays, loops and the commands they lead to. Nothing is run.

Of a loop the first value is taken, and said. What only a shell could know - the output of a command, a
variable that nobody sets - stays in a word as it is written, so that it can be named.
"""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cvx_core.errors import FormatError

LAUNCHERS = ("accelerate", "torchrun", "msrun", "python", "python3", "deepspeed")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)(\[@\]|\[\*\])?(?::?-([^}]*))?\}|(\w+))")
_ARITHMETIC = re.compile(r"\$\(\(([^()]*(?:\([^()]*\)[^()]*)*)\)\)")
_OPERATIONS: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}


@dataclass(frozen=True)
class Command:
    """One command with its variables filled in. line: of the script, from 1."""

    words: tuple[str, ...]
    line: int


@dataclass
class Script:
    """What a script says. variables: each a list of words; notes: what was chosen in reading it."""

    commands: list[Command] = field(default_factory=list)
    variables: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_script(path: Path) -> Script:
    """Read a shell script. Raises FormatError where it cannot be read or a quote is not closed."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read: {error}. Give a shell script in UTF-8.") from error
    script = Script()
    for statement, line in _statements(text, path):
        _take(script, statement, line, path)
    return script


def launches(script: Script) -> list[Command]:
    """Return the commands that start a Python program."""
    return [
        command
        for command in script.commands
        if Path(command.words[0]).name in LAUNCHERS and any(word.endswith(".py") for word in command.words)
    ]


def find_file(name: str, script: Path) -> Path:
    """Return a file that a script names: from here, or from a folder above the script. Raises FormatError."""
    for folder in (Path(), *script.resolve().parents):
        if (folder / name).is_file():
            return folder / name
    raise FormatError(
        f"{script}: names {name}, which is neither here nor below a folder above the script. Put it there, "
        "or run this from the folder that the script is run from."
    )


def _statements(text: str, path: Path) -> Iterator[tuple[str, int]]:
    """Yield statements with the line each begins at: quotes and brackets may hold line ends."""
    current, start, line, quote, depth = "", 1, 1, "", 0
    position = 0
    while position < len(text):
        char = text[position]
        position += 1
        if char == "\n":
            line += 1
        if char == "\\" and quote != "'" and position < len(text):
            follower = text[position]
            position += 1
            line += follower == "\n"
            current += " " if follower == "\n" else char + follower
        elif quote:
            quote = "" if char == quote else quote
            current += char
        elif char in "'\"":
            quote = char
            current += char
        elif char == "#" and (not current or current[-1].isspace()):
            end = text.find("\n", position)
            position = len(text) if end < 0 else end
        elif char in "()":
            depth += 1 if char == "(" else -1
            current += char
        elif char in "\n;|&" and depth <= 0 and not _redirects(current, char):
            if current.strip():
                yield current.strip(), start
            current, start = "", line
        else:
            current += char
        if not current.strip():
            current, start = "", line
    if quote:
        raise FormatError(f"{path}:{start}: a quote {quote} is not closed. Is the script complete?")
    if current.strip():
        yield current.strip(), start


def _redirects(before: str, char: str) -> bool:
    """Tell whether an ampersand belongs to a redirection such as 2>&1."""
    return char == "&" and before.endswith((">", "<"))


def _take(script: Script, statement: str, line: int, path: Path) -> None:
    """Add a statement's assignment, loop variable or command to the script."""
    for keyword in ("do ", "then ", "else ", "export ", "local ", "declare "):
        statement = statement.removeprefix(keyword).strip()
    if statement in ("do", "done", "then", "else", "fi"):
        return
    match = _ASSIGNMENT.fullmatch(statement)
    if match is not None and (value := _value(match[3], script, path, line)) is not None:
        before = script.variables.get(match[1], []) if match[2] else []
        script.variables[match[1]] = [*before, *value]
        return
    if statement.startswith(("if ", "elif ", "while ", "case ", "until ")):
        script.notes.append(f"line {line}: {statement.split()[0]!r} is not decided; what follows is read")
        return
    words = expand(statement, script, path, line)
    if words[:1] == ["for"] and words[2:3] == ["in"]:
        values = words[3:]
        script.variables[words[1]] = values[:1]
        if len(values) > 1:
            rest = ", ".join(values[1:])
            script.notes.append(f"line {line}: of the loop over {words[1]}, {values[0]} is taken, not {rest}")
        return
    if words[:1] == ["eval"]:
        # What would be run is a text that is split once more.
        words = _split(" ".join(words[1:]), path, line)
    while words and (environment := _ASSIGNMENT.fullmatch(words[0])) is not None:
        words = words[1:]
        del environment
    if words:
        script.commands.append(Command(tuple(_without_redirections(words)), line))


def _value(text: str, script: Script, path: Path, line: int) -> list[str] | None:
    """Return an assigned value: the words of an array, or one text; None where a command follows it."""
    if text.startswith("(") and text.endswith(")"):
        return expand(text[1:-1], script, path, line)
    words = _split(text, path, line, keep=True)
    if len(words) > 1:
        return None
    filled = "".join(_fill_quoted(text, script))
    return [filled]


def _fill_quoted(text: str, script: Script) -> Iterator[str]:
    """Yield the pieces of one word with quotes removed and, outside single quotes, variables filled in."""
    for piece in re.findall(r"'[^']*'|\"(?:\\.|[^\"\\])*\"|(?:\\.|[^'\"\\])+", text, re.DOTALL):
        if piece[0] == "'":
            yield piece[1:-1]
        elif piece[0] == '"':
            yield fill(re.sub(r"\\([\"\\`])", r"\1", piece[1:-1]), script)
        else:
            yield fill(re.sub(r"\\(.)", r"\1", piece), script)


def expand(text: str, script: Script, path: Path, line: int) -> list[str]:
    """Return the words of a text with variables filled in; an unquoted variable may give several."""
    words = []
    for raw in _split(text, path, line, keep=True):
        array = re.fullmatch(r'"?\$\{(\w+)\[[@*]\]\}"?', raw)
        if array is not None and array[1] in script.variables:
            words += script.variables[array[1]]
        elif "'" in raw or '"' in raw:
            words.append("".join(_fill_quoted(raw, script)))
        else:
            filled = fill(raw, script)
            words += _split(filled, path, line, keep=True) if filled != raw else [_unescaped(filled)]
    return words


def fill(text: str, script: Script) -> str:
    """Return a text with variables and sums replaced as far as they are known."""

    def variable(match: re.Match[str]) -> str:
        name = match[1] or match[4]
        if name in script.variables:
            return " ".join(script.variables[name])
        return match[3] if match[3] is not None else match[0]

    def total(match: re.Match[str]) -> str:
        inner = re.sub(r"\b([A-Za-z_]\w*)\b", r"${\1}", _VARIABLE.sub(variable, match[1]))
        value = _sum(_VARIABLE.sub(variable, inner))
        return match[0] if value is None else str(value)

    return _VARIABLE.sub(variable, _ARITHMETIC.sub(total, text))


def _sum(text: str) -> int | None:
    """Return the value of a sum of whole numbers, None where it is anything else."""
    try:
        return _node(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _node(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_node(node.left), _node(node.right))
    raise ValueError("not a sum of whole numbers")


def _split(text: str, path: Path, line: int, keep: bool = False) -> list[str]:
    """Split at spaces outside quotes. keep: leave quotes and backslashes in the words."""
    lexer = shlex.shlex(text, posix=not keep, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        return list(lexer) if not keep else _raw_words(text)
    except ValueError as error:
        raise FormatError(f"{path}:{line}: {error}. Is the script complete?") from error


def _raw_words(text: str) -> list[str]:
    """Split at spaces outside quotes and brackets, everything else left as it is."""
    words, current, quote, depth = [], "", "", 0
    escaped = False
    for char in text:
        if escaped:
            current, escaped = current + char, False
            continue
        escaped = char == "\\" and quote != "'"
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        depth += {"(": 1, "{": 1, ")": -1, "}": -1}.get(char, 0) if not quote else 0
        if char.isspace() and not quote and depth <= 0:
            if current:
                words.append(current)
            current = ""
        else:
            current += char
    return [*words, current] if current else words


def _unescaped(word: str) -> str:
    return re.sub(r"\\(.)", r"\1", word)


def _without_redirections(words: list[str]) -> Iterator[str]:
    skip = False
    for word in words:
        if skip:
            skip = False
        elif re.fullmatch(r"\d?>{1,2}|<", word):
            skip = True
        elif not re.match(r"\d?>", word):
            yield word
