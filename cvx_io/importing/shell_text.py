"""The text of a shell script, cut into statements and words. Nothing is filled in, and nothing is run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_NAME = re.compile(r"\$(?:[A-Za-z_]\w*|[0-9@*#?$!-])")
_HEREDOC = re.compile(r"<<(-?)\s*(\\?\w+|'[^'\n]*'|\"[^\"\n]*\")")
_OPERATOR = re.compile(r"&&|\|\||;;&?|;&|\|&|[;|&\n]")


class Statement(NamedTuple):
    """A statement without comments. line: from 1; joined: the operator before it, "" after a line's end."""

    text: str
    line: int
    joined: str


def unit(text: str, start: int, quoted: bool = False) -> int:
    """Return where the unit at a place ends: a quoted text, a substitution, an escaped or a single character.

    quoted: within double quotes, where a single quote is a character. Raises ValueError where it has no end.
    """
    char = text[start]
    if char == "\\":
        return min(start + 2, len(text))
    if char == "'" and not quoted:
        end = text.find("'", start + 1)
        if end < 0:
            raise ValueError("a quote ' is not closed")
        return end + 1
    if char == '"' or char == "`":
        return _closed(text, start + 1, char, char == '"', f"a quote {char}")
    if text.startswith("${", start):
        return _closed(text, start + 2, "}", quoted, "${")
    if text.startswith("$(", start):
        return _closed(text, start + 2, ")", False, "$(")
    name = _NAME.match(text, start)
    return name.end() if name is not None else start + 1


def _closed(text: str, start: int, end: str, quoted: bool, what: str) -> int:
    place, depth = start, 0
    while place < len(text):
        char = text[place]
        if char == end and depth == 0:
            return place + 1
        if end == ")":
            depth += {"(": 1, ")": -1}.get(char, 0)
        place = unit(text, place, quoted)
    raise ValueError(f"{what} is not closed")


def units(text: str, quoted: bool = False) -> Iterator[str]:
    """Yield a text's units. Raises ValueError."""
    place = 0
    while place < len(text):
        end = unit(text, place, quoted)
        yield text[place:end]
        place = end


def words(text: str) -> list[str]:
    """Split at spaces outside quotes, substitutions and brackets; everything stays as it is written."""
    found, current, depth = [], "", 0
    for piece in units(text):
        depth = max(depth + {"(": 1, ")": -1}.get(piece, 0), 0)
        if piece.isspace() and depth == 0:
            if current:
                found.append(current)
            current = ""
        else:
            current += piece
    return [*found, current] if current else found


class StatementError(ValueError):
    """A quote or bracket that is not closed. line: of the statement."""

    def __init__(self, line: int, message: str):
        super().__init__(message)
        self.line = line


def statements(text: str) -> Iterator[Statement]:
    """Yield the statements of a text; quotes, brackets and [[ ]] may hold what else would end one.

    Comments and here-documents are left out. Raises StatementError.
    """
    cutter = _Cutter(text)
    try:
        yield from cutter.cut()
    except ValueError as error:
        raise StatementError(cutter.start, str(error)) from error


class _Cutter:
    def __init__(self, text: str):
        self.text, self.place, self.line = text, 0, 1
        self.current, self.start, self.joined = "", 1, ""
        self.depth = 0
        self.heredocs: list[tuple[str, bool]] = []

    def cut(self) -> Iterator[Statement]:
        while self.place < len(self.text):
            if not self._passed_over() and (operator := self._operator()) is not None:
                if self.current.strip():
                    yield self._statement()
                self.joined = operator if operator in ("&&", "||") else ""
            if not self.current.strip():
                self.current, self.start = "", self.line
        if self.current.strip():
            yield self._statement()

    def _statement(self) -> Statement:
        found = Statement(self.current.strip(), self.start, self.joined)
        self.current, self.start = "", self.line
        return found

    def _passed_over(self) -> bool:
        """Pass over a continued line, a comment, or the beginning of a here-document."""
        text, place = self.text, self.place
        if text.startswith("\\\n", place):
            self.place, self.line = place + 2, self.line + 1
            return True
        if text[place] == "#" and (not self.current or self.current[-1] in " \t\n(;"):
            end = text.find("\n", place)
            self.place = len(text) if end < 0 else end
            return True
        match = _HEREDOC.match(text, place)
        if match is None or text.startswith("<<<", place) or self.current.endswith("<"):
            return False
        self.heredocs.append((match[2].strip("\\'\""), bool(match[1])))
        self.place = match.end()
        return True

    def _operator(self) -> str | None:
        """Pass over an operator and return it, or add what is here to the statement and return None."""
        match = _OPERATOR.match(self.text, self.place)
        if match is not None and self.depth == 0 and not self._redirects(match[0]):
            self.place = match.end()
            if match[0] == "\n":
                self._end_line()
            return match[0]
        self._add(self._test_end() or unit(self.text, self.place))
        return None

    def _add(self, end: int) -> None:
        piece = self.text[self.place : end]
        self.depth = max(self.depth + {"(": 1, ")": -1}.get(piece, 0), 0)
        self.line += piece.count("\n")
        # A continued line within double quotes is one line; within single quotes it stays.
        self.current += piece if piece.startswith("'") else piece.replace("\\\n", "")
        self.place = end

    def _test_end(self) -> int | None:
        """Return where a `[[ ... ]]` that begins here ends: its && and || end no statement."""
        if not re.match(r"\[\[\s", self.text[self.place : self.place + 3]):
            return None
        place = self.place
        while place < len(self.text) and not re.match(r"\s\]\]", self.text[place : place + 3]):
            place = unit(self.text, place)
        return min(place + 3, len(self.text))

    def _redirects(self, operator: str) -> bool:
        """Tell whether an ampersand belongs to a redirection such as 2>&1 or &>."""
        return operator == "&" and (
            self.current.endswith((">", "<")) or self.text.startswith(">", self.place + 1)
        )

    def _end_line(self) -> None:
        """Go on behind a line's end, and behind the here-documents that begin there."""
        self.line += 1
        for word, is_indented in self.heredocs:
            while self.place < len(self.text):
                end = self.text.find("\n", self.place)
                end = len(self.text) if end < 0 else end
                row = self.text[self.place : end]
                self.place, self.line = end + 1, self.line + 1
                if (row.lstrip("\t") if is_indented else row) == word:
                    break
        self.heredocs = []
