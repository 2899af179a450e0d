"""A recipe in the making, with an account of every setting of its source."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from cvx_core.errors import FormatError

Outcome = Literal["mapped", "differs", "no counterpart", "unmapped", "stated"]
ORDER: tuple[Outcome, ...] = ("unmapped", "differs", "no counterpart", "stated", "mapped")
TITLES: Mapping[Outcome, str] = {
    "mapped": "mapped",
    "differs": "mapped, with a difference",
    "no counterpart": "no counterpart here",
    "unmapped": "unmapped: unknown, and left out",
    "stated": "defaults of the source that differ from ours, written out",
}


@dataclass(frozen=True)
class Entry:
    """What became of one setting. name: as the source writes it; text: where it went, or what to do."""

    outcome: Outcome
    name: str
    value: str
    text: str


@dataclass
class Draft:
    """Settings are taken one by one; those that nobody takes are unmapped.

    given: {name: value}, a value being a text, a number, True for a bare flag, or a list.
    """

    source: str
    given: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _taken: dict[str, Any] = field(default_factory=dict)

    def has(self, *names: str) -> bool:
        """Tell whether any of the settings is given and not taken yet."""
        return any(name in self.given for name in names)

    def pop(self, name: str, kind: Callable[[Any], Any] = str, default: Any = None) -> Any:
        """Take a setting without saying where it goes. Raises FormatError for a value of another kind."""
        if name not in self.given:
            return default
        value = self._taken[name] = self.given.pop(name)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if value is True and name.startswith("--") and kind in VALUED:
            raise FormatError(
                f"{self.source}: {name} is given no value. Correct it there, or state "
                f"--also {name.removeprefix('--')}=VALUE."
            )
        try:
            return value if value is None else kind(value)
        except (TypeError, ValueError) as error:
            what = {"whole": "whole number", "float": "number", "flag": "truth value"}.get(kind.__name__)
            raise FormatError(
                f"{self.source}: {name} is {value!r}, which is no {what or kind.__name__}. Correct it "
                f"there, or state --also {name.removeprefix('--')}=VALUE."
            ) from error

    def choose(self, name: str, known: Collection[str], default: str | None = None) -> str | None:
        """Take a setting that is one of a few names. Raises FormatError for any other."""
        value = self.pop(name, str, default)
        if value is not None and value not in known:
            raise FormatError(f"{self.source}: {name} is {value!r}; expected {', '.join(known)}.")
        return value

    def put(self, address: str, value: Any) -> None:
        """Set a value of the recipe, such as "task.steps"."""
        *sections, last = address.split(".")
        place = self.recipe
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value

    def note(self, outcome: Outcome, name: str, value: Any, text: str) -> None:
        """Say what became of a setting."""
        self.entries.append(Entry(outcome, name, _text(value), text))

    def move(self, name: str, address: str, kind: Callable[[Any], Any] = str, default: Any = None) -> Any:
        """Take a setting to its place. default: the source's own, which is stated where nothing is given."""
        if name in self.given:
            value = self.pop(name, kind)
            self.put(address, value)
            self.note("mapped", name, value, f"{address}: {_text(value)}")
            return value
        if default is not None:
            self.put(address, default)
            self.note("stated", name, default, f"{address}: {_text(default)}")
        return default

    def drop(self, names: Sequence[str], instead: str) -> None:
        """Take settings that have no counterpart, each with what to do instead."""
        for name in names:
            if name in self.given:
                self.note("no counterpart", name, self.pop(name, lambda value: value), instead)

    def strategy(self, use: str, **fields: Any) -> None:
        """Add a strategy."""
        self.recipe.setdefault("parallel", []).append({"use": use, **fields})

    def close(self) -> None:
        """Count what nobody took as unmapped, and list what was taken without a word."""
        named = {name for entry in self.entries for name in entry.name.split(", ")}
        for name, value in self._taken.items():
            if name not in named:
                self.note("mapped", name, value, "the only value here, or part of another setting")
        for name, value in self.given.items():
            self.note("unmapped", name, value, "")
        self.given = {}

    def account(self) -> list[str]:
        """Return the account in lines, the least expected first."""
        lines = [*self.notes]
        for outcome in ORDER:
            found = [entry for entry in self.entries if entry.outcome == outcome]
            if found:
                lines.append(f"{TITLES[outcome]} ({len(found)}):")
                lines += [f"  {_line(entry)}" for entry in found]
        return lines

    def text(self) -> str:
        """Return the recipe as YAML, under the account as comments."""
        head = [f"Imported from {self.source}.", *self.account()]
        comments = "".join(f"# {line}".rstrip() + "\n" for line in "\n".join(head).splitlines())
        return comments + yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True, width=100)


PATHS = (
    "model",
    "output",
    "predictor.weights.path",
    "text_encoder.weights.path",
    "text_encoder.tokenizer",
    "autoencoder.weights.path",
    "dataset.path",
    "dataset.root",
    "dataset.prompts",
    "dataset.videos",
    "dataset.latents",
    "dataset.texts",
    "dataset.unconditional",
)


def rebase(recipe: dict[str, Any], folder: Path) -> None:
    """Turn relative paths, which start here in a script, into ones that start at the recipe's folder."""
    for address in PATHS:
        *sections, last = address.split(".")
        place: Any = recipe
        for section in sections:
            place = place.get(section, {}) if isinstance(place, dict) else {}
        if (
            isinstance(place, dict)
            and isinstance(place.get(last), str)
            and not Path(place[last]).is_absolute()
        ):
            place[last] = os.path.relpath(place[last], folder)


def whole(value: Any) -> int:
    """Return a whole number. Raises ValueError for anything else, true and 1.5 included."""
    if isinstance(value, bool) or float(value) != int(float(value)):
        raise ValueError
    return int(float(value))


def numbers(value: Any) -> list[int]:
    """Return a list of whole numbers."""
    return [whole(item) for item in (value if isinstance(value, list) else [value])]


def words(value: Any) -> list[str]:
    """Return a list of texts."""
    return [str(item) for item in (value if isinstance(value, list) else [value])]


VALUED = (str, float, whole, numbers, words)
"""Kinds of settings that a bare flag cannot be."""


def flag(value: Any) -> bool:
    """Return a truth value, also of the text that a command line gives. Raises ValueError for other texts."""
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "false", "1", "0"):
        return str(value).lower() in ("true", "1")
    raise ValueError


def flags_of(command: Sequence[str]) -> dict[str, Any]:
    """Return {name: value} of the flags of a command: True for a bare one, a list for several values.

    Raises FormatError for a word that belongs to no flag.
    """
    found: dict[str, Any] = {}
    name = None
    for word in command:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            found[name] = value if equals else True
        elif name is None:
            raise FormatError(f"the word {word!r} belongs to no flag. Is the command complete?")
        else:
            before = found[name]
            found[name] = (
                word if before is True else [*(before if isinstance(before, list) else [before]), word]
            )
    return found


def local_model(draft: Draft, name: str, weights: Path) -> str:
    """Return where a released model is looked for: a folder, or that of a hub's name below `weights`."""
    if Path(name).is_dir() or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        return str(Path(name).expanduser())
    place = str(weights / name.split("/")[1])
    draft.notes.append(f"{name} is a name on a hub: download it to {place}, nothing is fetched by a run")
    return place


def _line(entry: Entry) -> str:
    value = "" if entry.value == "true" and entry.name.startswith("--") else f" {entry.value}"
    return f"{entry.name}{value}" + (f" -> {entry.text}" if entry.text else "")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    return "null" if value is None else str(value)
