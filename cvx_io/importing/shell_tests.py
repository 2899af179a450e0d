"""Conditions of a shell script - `[ ... ]`, `[[ ... ]]`, `test ...` - decided where their sides are known."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from cvx_io.importing.shell_text import words
from cvx_io.importing.shell_values import Scope, expand, is_known, value

_NUMBERS: Mapping[str, Callable[[int, int], bool]] = {
    "-eq": lambda a, b: a == b,
    "-ne": lambda a, b: a != b,
    "-lt": lambda a, b: a < b,
    "-le": lambda a, b: a <= b,
    "-gt": lambda a, b: a > b,
    "-ge": lambda a, b: a >= b,
}
_TEXTS = ("=", "==", "!=")
_JOINING = ("&&", "||", "-a", "-o", ")")


def is_test(text: str) -> bool:
    """Tell whether a statement is a condition."""
    return re.match(r"(\[\[|\[|test)\s", text) is not None


def decide(text: str, scope: Scope) -> bool | None:
    """Return whether a condition holds, None where that is not known. Raises ValueError."""
    raw = words(text)
    is_double = raw[0] == "[["
    inner = raw[1:] if raw[0] == "test" else raw[1:-1]
    test = _Test(inner, scope, is_double)
    try:
        found = test.either()
    except IndexError:
        return None
    return found if test.place == len(inner) else None


class _Test:
    """Reads a condition word by word; None is what is not known."""

    def __init__(self, raw: list[str], scope: Scope, is_double: bool):
        self.raw, self.scope, self.is_double, self.place = raw, scope, is_double, 0

    def either(self) -> bool | None:
        found = self.both()
        while self._comes("||", "-o"):
            other = self.both()
            found = True if True in (found, other) else None if None in (found, other) else False
        return found

    def both(self) -> bool | None:
        found = self.one()
        while self._comes("&&", "-a"):
            other = self.one()
            found = False if False in (found, other) else None if None in (found, other) else True
        return found

    def one(self) -> bool | None:
        if self._comes("!"):
            found = self.one()
            return None if found is None else not found
        if self._comes("(", "\\("):
            found = self.either()
            return found if self._comes(")", "\\)") else None
        return self._plain()

    def _comes(self, *signs: str) -> bool:
        """Pass over one of the signs, where it is next."""
        if self.place < len(self.raw) and self.raw[self.place] in signs:
            self.place += 1
            return True
        return False

    def _plain(self) -> bool | None:
        first = self._next()
        if first in ("-z", "-n") and self._more():
            text = self._value(self._next())
            return None if text is None else (text == "") == (first == "-z")
        if re.fullmatch(r"-[a-zA-Z]", first) and self._more():
            self._next()
            return None  # about files, or the shell: not of the text
        left = self._value(first)
        if not self._more():
            return None if left is None else left != ""
        sign, right = self._next(), self._next()
        if sign in _TEXTS:
            return self._same(left, right, sign)
        numbers = [left, self._value(right)]
        if sign in _NUMBERS and all(text is not None and re.fullmatch(r"[+-]?\d+", text) for text in numbers):
            return _NUMBERS[sign](*(int(text) for text in numbers if text is not None))
        return None

    def _same(self, left: str | None, raw: str, sign: str) -> bool | None:
        right = self._value(raw)
        if left is None or right is None:
            return None
        is_pattern = self.is_double and raw[:1] not in ("'", '"')
        equal = fnmatchcase(left, right) if is_pattern else left == right
        return equal != (sign == "!=")

    def _next(self) -> str:
        self.place += 1
        return self.raw[self.place - 1]

    def _more(self) -> bool:
        return self.place < len(self.raw) and self.raw[self.place] not in _JOINING

    def _value(self, raw: str) -> str | None:
        text = value(raw, self.scope) if self.is_double else " ".join(expand(raw, self.scope))
        return text if is_known(text) else None
