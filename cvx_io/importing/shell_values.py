"""Words of a shell script with their variables filled in, as far as the text tells them. Nothing is run.

What only a shell could know - the output of a command, a variable that nobody sets - stays as it is written,
behind a mark.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cvx_io.importing.shell_text import units, words

MARK = "\0"
"""Stands before what is not known."""
_SPACES = str.maketrans({" ": "\1", "\n": "\2", "\t": "\3"})
_PLAIN = str.maketrans({"\1": " ", "\2": "\n", "\3": "\t", MARK: None})
_PARAMETER = re.compile(r"(#?)(\w+|[@*#])(\[[^\]]*\])?(?:(:?[-=+?])(.*))?", re.DOTALL)
_ARGUMENTS = ("@", "*")
_OPERATIONS: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass
class Scope:
    """What names stand for. variables: each a list of words; arguments: of the function that is read, None
    outside of one; notes: what was taken for granted.
    """

    path: Path
    variables: dict[str, list[str]] = field(default_factory=dict)
    arguments: list[str] | None = None
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Say something once."""
        if text not in self.notes:
            self.notes.append(text)

    def find(self, name: str) -> list[str] | None:
        """Return the words of a variable, None where it is not known."""
        if name in self.variables:
            return self.variables[name]
        if name in ("0", "BASH_SOURCE"):
            return [str(self.path.resolve())]
        if name == "PWD":
            return [str(Path.cwd())]
        if name in _ARGUMENTS:
            if self.arguments is None:
                self.note("the script is read as if it were given no arguments; --also states settings")
            return self.arguments or []
        if name == "#":
            return [str(len(self.arguments or []))]
        if name.isdigit() and self.arguments is not None:
            return self.arguments[int(name) - 1 :][:1]
        return ["0"] if name == "?" else None


def unknown(text: str) -> str:
    """Return a text marked as not known, as one word."""
    return text if text.startswith(MARK) else MARK + text.translate(_SPACES)


def is_known(text: str) -> bool:
    """Tell whether nothing in a text is marked."""
    return MARK not in text


def plain(text: str) -> str:
    """Return a text without marks."""
    return text.translate(_PLAIN)


def expand(text: str, scope: Scope) -> list[str]:
    """Return the words of a text with variables filled in; an unquoted one may give none or several.

    Raises ValueError for a quote that is not closed.
    """
    return [word for raw in words(text) for word in _fields(raw, scope)]


def value(raw: str, scope: Scope) -> str:
    """Return one word with quotes removed and variables filled in. Raises ValueError."""
    return "".join(text for text, _ in _pieces(raw, scope))


def _fields(raw: str, scope: Scope) -> list[str]:
    whole = re.fullmatch(r'"\$(?:\{(\w+)\[@\]\}|(@)|\{(@)\})"', raw)
    if whole is not None and (found := scope.find(whole[1] or "@")) is not None:
        return list(found)
    fields: list[str] = []
    is_open = False
    for text, is_quoted in _pieces(raw, scope):
        parts = [text] if is_quoted else text.split()
        if not is_quoted and text[:1].isspace():
            is_open = False
        for number, part in enumerate(parts):
            if is_open and number == 0:
                fields[-1] += part
            else:
                fields.append(part)
            is_open = True
        if not is_quoted and text[-1:].isspace():
            is_open = False
    return fields


def _pieces(raw: str, scope: Scope) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a word, filled in, and whether each is safe from being split at spaces."""
    for piece in units(raw):
        if piece[0] == "'" and len(piece) > 1:
            yield piece[1:-1], True
        elif piece[0] == '"' and len(piece) > 1:
            yield _double(piece[1:-1], scope), True
        elif piece[0] == "\\" and len(piece) > 1:
            yield piece[1:], True
        elif len(piece) > 1:
            yield _substitute(piece, scope), False
        elif piece != MARK:
            yield piece, True


def _double(inner: str, scope: Scope) -> str:
    """Return the inside of double quotes, filled in."""
    found = ""
    for piece in units(inner, quoted=True):
        if piece[0] == "\\" and len(piece) > 1:
            found += piece[1] if piece[1] in '"\\$`' else piece
        elif len(piece) > 1:
            found += _substitute(piece, scope)
        elif piece != MARK:
            found += piece
    return found


def _substitute(piece: str, scope: Scope) -> str:
    """Return what stands for $NAME, ${...}, $((...)), $(...) or `...`."""
    if piece.startswith("$((") and piece.endswith("))"):
        total = arithmetic(piece[3:-2], scope)
        return unknown(piece) if total is None else str(total)
    if piece.startswith(("$(", "`")):
        path = _path(piece[2:-1] if piece[0] == "$" else piece[1:-1], scope)
        return unknown(piece) if path is None else path
    if piece.startswith("${"):
        return _parameter(piece, scope)
    found = scope.find(piece[1:])
    return unknown(piece) if found is None else " ".join(found)


def _parameter(piece: str, scope: Scope) -> str:
    match = _PARAMETER.fullmatch(plain(piece[2:-1]))
    if match is None:
        return unknown(piece)
    count, name, index, sign, other = match.groups()
    found = scope.find(name)
    if count:
        return unknown(piece) if found is None or index is None else str(len(found))
    if index is not None and index not in ("[@]", "[*]") and found is not None:
        place = arithmetic(index[1:-1], scope)
        if place is None:
            return unknown(piece)
        found = found[place : place + 1]
    if sign is None:
        return unknown(piece) if found is None else " ".join(found)
    return _or_else(piece, name, found, sign, other, scope)


def _or_else(piece: str, name: str, found: list[str] | None, sign: str, other: str, scope: Scope) -> str:
    """Return ${NAME:-other} and its kin. A name that is set nowhere is taken to be unset."""
    is_set = found is not None and (":" not in sign or any(found))
    if sign[-1] == "+":
        return _double(other, scope) if is_set else ""
    if is_set:
        return " ".join(found or [])
    if sign[-1] == "?":
        return unknown(piece)
    filled = value(other, scope) if other[:1] in ("'", '"') else _double(other, scope)
    if sign[-1] == "=":
        scope.variables[name] = [filled]
    return filled


def arithmetic(text: str, scope: Scope) -> int | None:
    """Return the value of a sum or comparison of whole numbers, None where it is anything else."""
    filled = _double(text, scope)

    def variable(match: re.Match[str]) -> str:
        return " ".join(scope.find(match[0]) or [unknown(match[0])])

    try:
        return _node(ast.parse(re.sub(r"\b[A-Za-z_]\w*\b", variable, filled).strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _node(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_node(node.left), _node(node.right))
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _OPERATIONS:
        return int(_OPERATIONS[type(node.ops[0])](_node(node.left), _node(node.comparators[0])))
    raise ValueError("not a sum of whole numbers")


def _path(command: str, scope: Scope) -> str | None:
    """Return what a command about the names of paths gives, such as `cd "$(dirname "$0")" && pwd`."""
    try:
        given = [word for word in expand(re.sub(r"&?\d?>+\s*(&\d|\S+)", " ", command), scope) if word != "--"]
    except ValueError:
        return None
    if not all(map(is_known, given)):
        return None
    match given:
        case ["cd", folder, "&&", "pwd", *_]:
            return str(Path(folder))
        case ["pwd", *_]:
            return str(Path.cwd())
        case ["dirname", path]:
            return str(Path(path).parent)
        case ["basename", path]:
            return Path(path).name
        case ["basename", path, suffix]:
            return Path(path).name.removesuffix(suffix)
        case ["realpath", path] | ["readlink", "-f", path] | ["echo", path]:
            return str(Path(path)) if given[0] != "echo" else path
    return None
