"""A shell script's tree read in order: what its variables stand for, and the commands it leads to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cvx_io.importing.shell_tests import decide, is_test
from cvx_io.importing.shell_text import StatementError, statements, words
from cvx_io.importing.shell_tree import Node, tree
from cvx_io.importing.shell_values import MARK, Scope, arithmetic, expand, is_known, plain, unknown, value

LAUNCHERS = ("accelerate", "torchrun", "msrun", "python", "python3", "deepspeed")
_PREFIXES = ("nohup", "exec", "time", "command")
_DECLARATIONS = ("export", "local", "declare", "readonly", "typeset")
_SUCCEED = (
    "cd",
    "mkdir",
    "echo",
    "printf",
    "source",
    ".",
    "set",
    "rm",
    "cp",
    "mv",
    "touch",
    "tee",
    "sleep",
    "wait",
)
"""Commands that are taken to succeed, as far as && and || ask."""
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_DEPTH = 20


@dataclass(frozen=True)
class Command:
    """One command with its variables filled in. line: of the script, from 1.

    unknown: places of words that hold what only a shell could know; condition: that it depends on, where that
    is not known; environment: what stands before it, or is set, as NAME=VALUE.
    """

    words: tuple[str, ...]
    line: int
    unknown: frozenset[int] = frozenset()
    condition: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def starts_python(self) -> bool:
        """Whether it starts a Python program."""
        return Path(self.words[0]).name in LAUNCHERS and any(word.endswith(".py") for word in self.words)


@dataclass
class Script:
    """What a script says. undecided: why a variable is not known, by name; uncalled: functions, by line."""

    scope: Scope
    commands: list[Command] = field(default_factory=list)
    undecided: dict[str, str] = field(default_factory=dict)
    uncalled: dict[str, int] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What was chosen in reading it."""
        return self.scope.notes


class End(Exception):  # noqa: N818
    """The script ends, or the function."""


class Reader:
    """Reads nodes in order. script: what is found; line: where it is."""

    def __init__(self, script: Script):
        self.script, self.scope, self.line = script, script.scope, 1
        self._functions: dict[str, list[Node]] = {}
        self._condition, self._depth = "", 0

    def block(self, nodes: list[Node]) -> bool | None:
        """Read nodes in order; return whether the last succeeds, None where that is not known."""
        status: bool | None = True
        for node in nodes:
            if node.joined and status is None:
                self._branches([[node]], f"what stands before `{node.joined}` on line {node.line}")
            elif not node.joined or status == (node.joined == "&&"):
                status = self._node(node)
        return status

    def _node(self, node: Node) -> bool | None:
        self.line = node.line
        match node.kind:
            case "if":
                return self._if(node)
            case "while" | "until":
                return self._while(node)
            case "for":
                self._for(node)
            case "case":
                self._branches(node.blocks, f"`{node.text.splitlines()[0]}` on line {node.line}")
                return None
            case "function":
                self._functions[node.text] = node.blocks[0]
                self.script.uncalled[node.text] = node.line
            case "group":
                return self.block(node.blocks[0])
            case _:
                return self._simple(node.text, node.line)
        return True

    def _if(self, node: Node) -> bool | None:
        """Read the branch that holds; all that may, where it is not known which does."""
        pairs = [(node.blocks[i], node.blocks[i + 1]) for i in range(0, len(node.blocks) - 1, 2)]
        last = node.blocks[-1] if len(node.blocks) % 2 else None
        for number, (condition, body) in enumerate(pairs):
            holds = self.block(condition)
            if holds:
                return self.block(body)
            if holds is None:
                bodies = [body for _, body in pairs[number:]] + ([last] if last is not None else [])
                self._branches(bodies, self._why(condition, node.line), last is not None)
                return None
        return self.block(last) if last is not None else True

    def _while(self, node: Node) -> bool | None:
        holds = self.block(node.blocks[0])
        if holds is None:
            self._branches([node.blocks[1]], self._why(node.blocks[0], node.line))
        elif holds == (node.kind == "while"):
            self.block(node.blocks[1])
        return True

    @staticmethod
    def _why(condition: list[Node], line: int) -> str:
        return f"`{condition[-1].text if condition else ''}` on line {line}"

    def _branches(self, bodies: list[list[Node]], why: str, complete: bool = False) -> None:
        """Read branches of which nobody knows which is taken. complete: one of them is."""
        before, outer = self.scope.variables, self._condition
        ends = [] if complete else [before]
        self._condition = why
        for body in bodies:
            self.scope.variables = dict(before)
            try:
                self.block(body)
            except End:
                continue
            ends.append(self.scope.variables)
        self._condition = outer
        if not ends:
            raise End
        self.scope.variables, differ = {}, []
        for name in dict.fromkeys(name for end in ends for name in end):
            values = [end.get(name) for end in ends]
            if all(found == values[0] for found in values):
                self.scope.variables[name] = ends[0][name]
                continue
            differ.append(name)
            self.scope.variables[name] = [unknown("${" + name + "}")]
            self.script.undecided[name] = why
        if differ:
            self.scope.note(f"{why} is not decided, so {', '.join(differ)} is not known after it")

    def _for(self, node: Node) -> None:
        """Read a loop's body once, with the first value."""
        head = expand(node.text.removesuffix(";"), self.scope)
        if head[2:3] != ["in"]:
            return self._branches(node.blocks, f"`{node.text}` on line {node.line}")
        values = head[3:]
        if not values:
            return None
        self.scope.variables[head[1]] = values[:1]
        if len(values) > 1:
            rest = ", ".join(map(plain, values[1:]))
            self.scope.note(
                f"line {node.line}: of the loop over {head[1]}, {plain(values[0])} is taken, not {rest}"
            )
        self.block(node.blocks[0])
        return None

    def _simple(self, text: str, line: int) -> bool | None:
        """Read an assignment, a condition or a command."""
        if text.startswith("! "):
            status = self._simple(text[2:].strip(), line)
            return None if status is None else not status
        if is_test(text):
            return decide(text, self.scope)
        if text.startswith("((") and text.endswith("))"):
            total = arithmetic(text[2:-2], self.scope)
            return None if total is None else total != 0
        if text.startswith("(") and text.endswith(")"):
            return self.block(_lines(text[1:-1], line))
        raw = words(text)
        if raw[0] in _DECLARATIONS:
            for item in raw[1:]:
                if (match := _ASSIGNMENT.fullmatch(item)) is not None:
                    self._assign(match)
            return True
        set_before = []
        while raw and (match := _ASSIGNMENT.fullmatch(raw[0])) is not None:
            set_before.append(match)
            raw = raw[1:]
        if not raw:
            for match in set_before:
                self._assign(match)
            return True
        environment = {match[1]: plain(value(match[3], self.scope)) for match in set_before}
        return self._command(expand(" ".join(raw), self.scope), line, environment)

    def _assign(self, match: re.Match[str]) -> None:
        name, is_added, text = match[1], bool(match[2]), match[3]
        before = self.scope.variables.get(name, []) if is_added else []
        if text.startswith("(") and text.endswith(")"):
            self.scope.variables[name] = [*before, *expand(text[1:-1], self.scope)]
        else:
            self.scope.variables[name] = [" ".join(before) + value(text, self.scope)]

    def _command(self, given: list[str], line: int, environment: dict[str, str]) -> bool | None:
        while given and given[0] in _PREFIXES:
            given = given[1:]
        if not given:
            return True
        name = given[0]
        if name in self._functions:
            return self._call(name, given[1:])
        if name in ("exit", "return"):
            raise End
        if name == "eval":
            return self.block(_lines(" ".join(given[1:]), line))
        if name == "unset":
            for variable in given[1:]:
                self.scope.variables[variable] = []
            return True
        if name in ("true", "false", ":"):
            return name != "false"
        if name == "cd" and not self._condition:
            where = plain(" ".join(given[1:]))
            self.scope.note(f"line {line}: `cd {where}` is not followed: paths of the script start here")
        command = self._with_environment(list(_without_redirections(given)), line, environment)
        if command is None:
            return True
        self.script.commands.append(command)
        return True if name in _SUCCEED or command.starts_python else None

    def _with_environment(self, given: list[str], line: int, environment: dict[str, str]) -> Command | None:
        if not given:
            return None
        shared = {name: plain(" ".join(found)) for name, found in self.scope.variables.items()}
        places = frozenset(i for i, word in enumerate(given) if not is_known(word))
        return Command(tuple(map(plain, given)), line, places, self._condition, {**shared, **environment})

    def _call(self, name: str, arguments: list[str]) -> bool | None:
        """Read a function's body with what it is given."""
        self.script.uncalled.pop(name, None)
        if self._depth >= _DEPTH:
            return None
        outer, self.scope.arguments = self.scope.arguments, arguments
        self._depth += 1
        try:
            return self.block(self._functions[name])
        except End:
            return True
        finally:
            self.scope.arguments = outer
            self._depth -= 1


def _lines(text: str, line: int) -> list[Node]:
    """Return the tree of a text that is a script in itself, all of it on one line of this."""
    try:
        return tree(statement._replace(line=line) for statement in statements(text))
    except StatementError as error:
        raise StatementError(line, str(error)) from error


def _without_redirections(given: list[str]) -> Iterator[str]:
    skip = False
    for word in given:
        if skip:
            skip = False
        elif re.fullmatch(r"(&|\d)?>{1,2}|<{1,3}", word):
            skip = True
        elif not re.match(r"(&|\d)?>|<", word.lstrip(MARK)):
            yield word
