"""Statements of a shell script as a tree of branches, loops and functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cvx_io.importing.shell_text import Statement, StatementError

_RESERVED = re.compile(r"(if|elif|while|until|then|else|do|fi|done|esac|\{|\})(?:\s+|(?=[<>|&;])|$)")
_FUNCTION = re.compile(r"(?:function\s+([\w:-]+)\s*(?:\(\s*\))?|([\w:-]+)\s*\(\s*\))\s*(?=\{|$)")
_PATTERN = re.compile(r"\(?[^\s()]*\)\s*")


@dataclass
class Node:
    """A part of a script.

    kind: simple, if, while, until, for, case, function or group; text: the statement, the head of a for or
    case, or a function's name; blocks: of an if, condition and body in turns, and the else if there is one;
    of a while, condition and body; else the body.
    """

    kind: str
    line: int
    joined: str = ""
    text: str = ""
    blocks: list[list[Node]] = field(default_factory=list)


def tree(statements: Iterable[Statement]) -> list[Node]:
    """Return the tree of a script. Raises StatementError where a branch or loop has no end."""
    return _Parser(list(_peeled(statements))).block(())


def _peeled(statements: Iterable[Statement]) -> Iterator[Statement]:
    """Yield reserved words as statements of their own."""
    for text, line, joined in statements:
        while True:
            function, reserved = _FUNCTION.match(text), _RESERVED.match(text)
            found = function or reserved
            if found is None:
                break
            yield Statement(
                found[0].strip() if found is reserved else f"{found[1] or found[2]}()", line, joined
            )
            text, joined = text[found.end() :].strip(), ""
            if reserved is not None and found[1] in ("fi", "done", "}", "esac") and text[:1] in ("<", ">"):
                text = ""  # a redirection of all of it
        if text:
            yield Statement(text, line, joined)


class _Parser:
    def __init__(self, rest: list[Statement]):
        self.rest, self.place = rest, 0

    def block(self, ends: tuple[str, ...]) -> list[Node]:
        """Return the nodes up to one of the words that end the block, which is not passed over."""
        nodes: list[Node] = []
        while self.place < len(self.rest) and self.rest[self.place].text not in ends:
            nodes.append(self._node(self._next()))
        return nodes

    def _next(self) -> Statement:
        self.place += 1
        return self.rest[self.place - 1]

    def _expect(self, words: tuple[str, ...], begin: Statement) -> str:
        if self.place >= len(self.rest) or self.rest[self.place].text not in words:
            what = begin.text.split()[0]
            raise StatementError(begin.line, f"{what!r} has no {words[-1]!r}")
        return self._next().text

    def _node(self, begin: Statement) -> Node:
        text, line, joined = begin
        first = text.split()[0]
        if text == "if":
            return Node("if", line, joined, blocks=self._if(begin))
        if text in ("while", "until"):
            return Node(text, line, joined, blocks=[self._up_to("do", begin), self._up_to("done", begin)])
        if first in ("for", "select") and len(text.split()) > 1:
            self._up_to("do", begin)
            return Node("for", line, joined, text, [self._up_to("done", begin)])
        if first == "case":
            return Node("case", line, joined, text, self._case(begin))
        if text == "{":
            return Node("group", line, joined, blocks=[self._up_to("}", begin)])
        if text.endswith("()") and " " not in text:
            self._expect(("{",), begin)
            return Node("function", line, joined, text[:-2], [self._up_to("}", begin)])
        return Node("simple", line, joined, text)

    def _up_to(self, end: str, begin: Statement) -> list[Node]:
        nodes = self.block((end,))
        self._expect((end,), begin)
        return nodes

    def _if(self, begin: Statement) -> list[list[Node]]:
        blocks = []
        while True:
            blocks.append(self._up_to("then", begin))
            blocks.append(self.block(("elif", "else", "fi")))
            word = self._expect(("elif", "else", "fi"), begin)
            if word == "else":
                blocks.append(self._up_to("fi", begin))
            if word != "elif":
                return blocks

    def _case(self, begin: Statement) -> list[list[Node]]:
        """Return the bodies of a case, one for each pattern."""
        rest = begin.text.split(" in ", 1)
        head = [Statement(rest[1], begin.line, "")] if len(rest) > 1 and rest[1].strip() else []
        self.rest[self.place : self.place] = head
        bodies: list[list[Node]] = []
        while self.place < len(self.rest) and self.rest[self.place].text != "esac":
            text, line, joined = self._next()
            pattern = _PATTERN.match(text)
            if pattern is not None:
                bodies.append([])
                text = text[pattern.end() :]
            if text and bodies:
                self.rest[self.place : self.place] = _peeled([Statement(text, line, joined)])
                bodies[-1].append(self._node(self._next()))
        self._expect(("esac",), begin)
        return bodies
