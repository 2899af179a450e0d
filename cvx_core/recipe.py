"""Recipes as written: strict YAML with the line of every value, and `--set` overrides. Knows no component."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cvx_core.errors import Problem, RecipeError

Address = tuple[str | int, ...]

_NULL = re.compile(r"^(~|null|)$")
_BOOL = re.compile(r"^(true|false|True|False)$")
_INT = re.compile(r"^[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_SPECIAL = {".inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "map", "seq")}
_OTHER_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("timestamp", "merge", "value")}


@dataclass(frozen=True)
class Recipe:
    """A recipe's plain data, and where each value stands.

    data: nested dicts and lists; marks: address -> "file:line" or "--set ..."; base: the folder that relative
    paths are relative to (values from `--set` are relative to the working directory instead).
    """

    data: dict[str, Any]
    marks: dict[Address, str] = field(default_factory=dict)
    base: Path = Path()
    source: str = "recipe"

    def where(self, address: Address) -> str:
        """Return the place of a value, or of its nearest enclosing one."""
        for length in range(len(address), -1, -1):
            if address[:length] in self.marks:
                return self.marks[address[:length]]
        return self.source

    def base_of(self, address: Address) -> Path:
        """Return the folder that a relative path at this address is relative to."""
        return Path.cwd() if self.where(address).startswith("--set") else self.base

    def problem(self, address: Address, message: str) -> Problem:
        """Return a problem that names the value's place."""
        return Problem(dotted(address), message, self.where(address))


def dotted(address: Address) -> str:
    """Return an address as a user writes it: ("parallel", 1, "use") -> "parallel[1].use"."""
    text = ""
    for part in address:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def load(path: str | Path, overrides: dict[str, Any] | Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides: {"task.steps": 5} or ["task.steps=5"].

    Raises RecipeError with every problem of the text: syntax, duplicate keys, anchors, tags, bad overrides.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError([Problem("", "no such file. Give the path of a recipe.", str(path))]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([Problem("", f"cannot be read: {error}", str(path))]) from None
    recipe = parse(text, source=str(path), base=path.resolve().parent)
    return override(recipe, overrides)


def parse(text: str, source: str = "recipe", base: Path = Path()) -> Recipe:
    """Turn recipe text into data with marks. Raises RecipeError as `load` does."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        what = getattr(error, "problem", None) or str(error)
        raise RecipeError([Problem("", f"not valid YAML: {what}.", where)]) from None
    reader = _Reader(source)
    data = reader.value(node, ()) if node is not None else {}
    if not isinstance(data, dict):
        reader.problems.append(
            Problem("", "a recipe is a mapping of sections, such as `task: {use: train}`.", source)
        )
    if reader.problems:
        raise RecipeError(reader.problems)
    return Recipe(data, reader.marks, base, source)


def override(recipe: Recipe, overrides: dict[str, Any] | Sequence[str]) -> Recipe:
    """Return the recipe with values replaced. Raises RecipeError naming every override that cannot be
    applied.
    """
    data, marks, problems = _copy(recipe.data), dict(recipe.marks), []
    items = overrides.items() if isinstance(overrides, dict) else (_split(text) for text in overrides)
    for key, value in items:
        where = f"--set {key}"
        if value is _MISSING or not key:
            problems.append(Problem("", "expected key=value, such as task.steps=100.", where))
            continue
        try:
            parsed = _parse_value(value) if isinstance(value, str) else value
            address = _assign(data, key, parsed)
        except (ValueError, RecipeError) as error:
            problems.append(Problem("", str(error).split("\n")[0], where))
            continue
        marks = {a: m for a, m in marks.items() if a[: len(address)] != address}
        marks[address] = where
    if problems:
        raise RecipeError(problems)
    return Recipe(data, marks, recipe.base, recipe.source)


class _Reader:
    """Builds plain values from YAML nodes and collects marks and problems."""

    def __init__(self, source: str):
        self.source = source
        self.marks: dict[Address, str] = {}
        self.problems: list[Problem] = []
        self._seen: set[int] = set()

    def value(self, node: yaml.Node, address: Address) -> Any:
        where = f"{self.source}:{node.start_mark.line + 1}"
        self.marks.setdefault(address, where)
        if id(node) in self._seen:
            self.problems.append(
                Problem(dotted(address), "anchors and aliases are not allowed; repeat it.", where)
            )
            return None
        self._seen.add(id(node))
        if node.tag not in _PLAIN_TAGS | _OTHER_TAGS:
            self.problems.append(
                Problem(dotted(address), f"tag {node.tag!r} is not allowed; write a value.", where)
            )
            return None
        if isinstance(node, yaml.MappingNode):
            return dict(self._pairs(node, address))
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*address, index)) for index, item in enumerate(node.value)]
        return node.value if getattr(node, "style", None) else scalar(node.value)

    def _pairs(self, node: yaml.MappingNode, address: Address) -> Iterator[tuple[str, Any]]:
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            where, key = f"{self.source}:{line}", str(key_node.value)
            child = (*address, key)
            if key in lines:
                message = f"given twice, first on line {lines[key]}. Remove one."
                self.problems.append(Problem(dotted(child), message, where))
                continue
            lines[key] = line
            self.marks[child] = where
            yield key, self.value(value_node, child)


def scalar(text: str) -> Any:
    """Return a plain scalar's value by the YAML 1.2 core rules: `1e-4` is a number, `no` is text."""
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    if _INT.match(text):
        return int(text.replace("_", ""))
    if _FLOAT.match(text):
        return float(text.replace("_", ""))
    return _SPECIAL.get(text, text)


_MISSING = object()


def _split(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    return key.strip(), value if equals else _MISSING


def _parse_value(text: str) -> Any:
    return parse(f"value: {text}").data["value"]


def _assign(data: dict[str, Any], key: str, value: Any) -> Address:
    parts: list[str | int] = [int(p) if p.isdigit() else p for p in re.findall(r"[^.\[\]]+", key)]
    target: Any = data
    for depth, part in enumerate(parts):
        here = dotted(tuple(parts[:depth])) or "the recipe"
        if isinstance(target, list):
            if not isinstance(part, int) or part >= len(target):
                raise ValueError(
                    f"{here} is a list of {len(target)}; give an index below that, not {part!r}."
                )
        elif not isinstance(target, dict):
            raise ValueError(f"{here} is {target!r}, not a mapping; set it as a whole.")
        else:
            part = parts[depth] = str(part)
        if depth == len(parts) - 1:
            target[part] = value
        elif isinstance(target, dict):
            target = target.setdefault(part, {})
        else:
            target = target[part]
    return tuple(parts)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value
