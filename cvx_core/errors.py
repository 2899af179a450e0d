"""The error types of cvx, and the suggestion helper they share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class CvxError(Exception):
    """Base of every error that a user can act on; the command line prints it without a traceback."""


class SaidError(CvxError):
    """Ends a rank of a run without a word, since another one has said what is wrong."""


class PluginError(CvxError):
    """A plugin package is at fault: it fails to import, collides or breaks a contract."""


class FormatError(CvxError):
    """Data on disk is at fault: missing, truncated, misnamed or misshaped."""


class ListingError(FormatError):
    """A listing of data has problems. rows: those without; problems: (place, message) of all others."""

    def __init__(self, message: str, rows: Sequence[Any] = (), problems: Sequence[tuple[str, str]] = ()):
        super().__init__(message)
        self.rows, self.problems = tuple(rows), tuple(problems)


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe.

    path: dotted recipe path, "" for the document; message: what is wrong and what to do; where: "file:line".
    """

    path: str
    message: str
    where: str = ""

    def __str__(self) -> str:
        parts = [part for part in (self.where, self.path, self.message) if part]
        return ": ".join(parts)


class RecipeError(CvxError):
    """The user's recipe is at fault. Carries every problem found, not only the first."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = tuple(problems)
        count = len(self.problems)
        tail = f"{count} problem{'s' if count != 1 else ''}; nothing was built."
        super().__init__("\n".join([*map(str, self.problems), tail]))


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest option, or "" when nothing is near."""
    near = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
