"""Names tables: how a file's tensor names and fused tensors map to canonical ones. Data, usable both ways.

A rule is written once, from the foreign name to the canonical one; the reverse follows from it. In a template
`{i}`, `{j}` and `{k}` stand for a number, `{rest}` for all that is left, any other field for one dotted
component; `{~i}` is `{i}` counted from the other end, the highest number that the names have. The first rule
that matches a name decides, either way. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from cvx_core.errors import FormatError, PluginError
from cvx_core.interfaces import Tensors
from cvx_io.regroup import Parts, Renaming, Step, at, listed, nearest

_FIELD = re.compile(r"\{(~?\w+)\}")
_FIELD_PATTERNS = {"i": r"\d+", "j": r"\d+", "k": r"\d+", "rest": r".+"}


Split = Literal["column", "row", "per_part"]
"""How tensor-parallel ranks share a foreign tensor: chunks of dim 0, of dim 1, or of dim 0 of each part."""


class NamesError(FormatError):
    """Names that a table has no rule for. unmatched: how many."""

    def __init__(self, unmatched: int, message: str):
        super().__init__(message)
        self.unmatched = unmatched


@dataclass(frozen=True)
class Rename:
    """The foreign tensor, under another name.

    whole: (n, other) says that the whole tensor has n times the rows of the foreign tensor `other`; older
    files hold it whole on each tensor-parallel rank, and are known by that.
    """

    foreign: str
    canonical: str
    tp: Split | None = None
    whole: tuple[int, str] | None = None

    @property
    def parts(self) -> int:
        return 1

    @property
    def into(self) -> Parts:
        return {self.canonical: (0,)}


@dataclass(frozen=True)
class Cat:
    """The foreign tensor is the canonical ones, of equal shape, joined on dim 0 in the order given."""

    foreign: str
    canonical: Sequence[str]
    tp: Split | None = None

    @property
    def parts(self) -> int:
        return len(self.canonical)

    @property
    def into(self) -> Parts:
        return {name: (part,) for part, name in enumerate(self.canonical)}


@dataclass(frozen=True)
class Chunks:
    """The foreign tensor is `parts` equal chunks on dim 0; a canonical tensor joins those listed for it."""

    foreign: str
    parts: int
    into: Parts
    tp: Split | None = None


@dataclass(frozen=True)
class Drop:
    """The foreign tensor is not wanted; `reason` says why. In reverse nothing is written for it."""

    foreign: str
    reason: str
    tp: Split | None = None

    @property
    def parts(self) -> int:
        return 0

    @property
    def into(self) -> Parts:
        return {}


Rule = Rename | Cat | Chunks | Drop


@dataclass(frozen=True)
class Names:
    """The rule table of one model family in one format.

    prefix: what every foreign name of this model starts with; a name without it belongs to something else in
    the same file and is left out. blocks: what the foreign names of numbered blocks start with, the number
    next; last: what the foreign names behind the blocks start with; both are for formats that store pipeline
    stages apart. keeps: canonical names of tables the model computes itself, which files of this format may
    hold; insists: those they must hold; fused: {module: modules} of LoRA weights that one adapter changes
    together. Raises PluginError on a rule that cannot be reversed.
    """

    rules: Sequence[Rule]
    prefix: str = ""
    blocks: str = ""
    last: Sequence[str] = ()
    keeps: Collection[str] = ()
    insists: Collection[str] = ()
    fused: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rule in self.rules:
            _check_rule(rule)

    def plan(self, foreign: Iterable[str], where: str = "") -> Renaming:
        """Match a file's names, for reading. `where` is the file, for messages.

        Raises FormatError on names without a rule, and on a canonical name that would be produced twice.
        """
        foreign = list(foreign)
        numbers = _Numbers(foreign)
        steps: dict[str, Step] = {}
        dropped: dict[str, str] = {}
        unmatched: list[str] = []
        for name in foreign:
            if not name.startswith(self.prefix):
                dropped[name] = f"does not start with {self.prefix!r}"
            elif (found := self._find(name, numbers)) is None:
                unmatched.append(name)
            elif isinstance(found, Drop):
                dropped[name] = found.reason
            else:
                steps[name] = found
        _refuse(unmatched, [self.prefix + rule.foreign for rule in self.rules], where)
        if dropped and not steps:
            name, reason = next(iter(dropped.items()))
            text = f"{at(where)}holds nothing of this model; {name!r}: {reason}. Check the path."
            raise NamesError(len(dropped), text)
        return Renaming(_grouped(steps, where), dropped)

    def plan_reverse(self, canonical: Iterable[str], where: str = "") -> Renaming:
        """Match canonical names, for writing. Raises FormatError as plan does, and on an incomplete group."""
        canonical = list(canonical)
        numbers = _Numbers(canonical)
        found = {name: self._find_reverse(name, numbers) for name in canonical}
        templates = [template for rule in self.rules for template in rule.into]
        _refuse([name for name, step in found.items() if step is None], templates, where)
        return Renaming(_grouped({name: step for name, step in found.items() if step is not None}, where))

    def read(self, source: Tensors, where: str = "") -> Tensors:
        """Return a file's tensors under canonical names. Raises FormatError as plan does."""
        return self.plan(source.index, where).tensors(source)

    def write(self, tensors: Tensors, where: str = "") -> Tensors:
        """Return canonical tensors under foreign names. Raises FormatError as plan_reverse does."""
        return self.plan_reverse(tensors.index, where).tensors(tensors)

    def split_of(self, foreign: str) -> tuple[Split | None, int]:
        """Return how tensor-parallel ranks share a foreign tensor, and the number of parts it consists of."""
        for template, rule in self._foreign:
            if template.match(foreign, _Numbers()) is not None:
                return rule.tp, rule.parts
        return None, 1

    def whole_rows(self, foreign: str) -> tuple[int, str] | None:
        """Return (n, other) where a whole tensor is known by having n times the rows of tensor `other`."""
        for template, rule in self._foreign:
            if template.match(foreign, _Numbers()) is not None:
                return getattr(rule, "whole", None)
        return None

    def holds(self, canonical: str) -> bool:
        """Tell whether a rule has a place for a canonical name."""
        return self._find_reverse(canonical, _Numbers()) is not None

    def preferring(self, start: str) -> Names:
        """Return the table that writes names starting with `start` where it has the choice of several."""
        first = [rule for rule in self.rules if rule.foreign.startswith(start)]
        return replace(self, rules=(*first, *(rule for rule in self.rules if rule not in first)))

    @cached_property
    def _foreign(self) -> list[tuple[_Template, Rule]]:
        return [(_Template(self.prefix + rule.foreign, rule), rule) for rule in self.rules]

    @cached_property
    def _canonical(self) -> list[tuple[_Template, Rule]]:
        return [(_Template(template, rule), rule) for rule in self.rules for template in rule.into]

    def _find(self, name: str, numbers: _Numbers) -> Step | Drop | None:
        for template, rule in self._foreign:
            if (values := template.match(name, numbers)) is not None:
                if isinstance(rule, Drop):
                    return rule
                return Step(rule.parts, {name: tuple(range(rule.parts))}, _filled(rule.into, values))
        return None

    def _find_reverse(self, name: str, numbers: _Numbers) -> Step | None:
        for template, rule in self._canonical:
            if (values := template.match(name, numbers)) is not None:
                target = self.prefix + rule.foreign.format_map(values)
                return Step(rule.parts, _filled(rule.into, values), {target: tuple(range(rule.parts))})
        return None


def _refuse(unmatched: list[str], templates: list[str], where: str) -> None:
    if unmatched:
        raise NamesError(
            len(unmatched),
            f"{at(where)}no rule matches {len(unmatched)} of the names: {listed(unmatched)}."
            f"{nearest(unmatched[0], templates, 'rule')} Wrong model or format, or a newer export?",
        )


class _Template:
    """A template as a pattern; matching yields the value of each field."""

    def __init__(self, text: str, rule: Rule):
        self.counts_back = any("{~" in template for template in (rule.foreign, *rule.into))
        self.is_flipped = "{~" in text
        pattern, end = "", 0
        for found in _FIELD.finditer(text):
            name = found[1].lstrip("~")
            repeated = f"(?P<{name}>" in pattern
            group = f"(?P={name})" if repeated else f"(?P<{name}>{_FIELD_PATTERNS.get(name, '[^.]+')})"
            pattern += re.escape(text[end : found.start()]) + group
            end = found.end()
        self.pattern = re.compile(pattern + re.escape(text[end:]), re.DOTALL)

    def match(self, name: str, numbers: _Numbers) -> dict[str, str] | None:
        """Return the fields of a name, None if it does not match. numbers: those of all names, for `{~i}`."""
        found = self.pattern.fullmatch(name)
        if found is None:
            return None
        values = found.groupdict()
        if self.counts_back:
            other = str(numbers.highest(name[: found.start("i")]) - int(values["i"]))
            values |= {"i": other, "~i": values["i"]} if self.is_flipped else {"~i": other}
        return values


class _Numbers:
    """The numbers in a set of names: how many blocks there are is told by the highest."""

    def __init__(self, names: Collection[str] = ()):
        self._names = names
        self._highest: dict[str, int] = {}  # to go through all the names for each of them would take long

    def highest(self, before: str) -> int:
        """Return the highest number that follows `before` in the names, 0 where there is none."""
        if before not in self._highest:
            rests = (name[len(before) :] for name in self._names if name.startswith(before))
            numbers = (re.match(r"\d+", rest) for rest in rests)
            self._highest[before] = max((int(number[0]) for number in numbers if number), default=0)
        return self._highest[before]


def _grouped(steps: Mapping[str, Step], where: str) -> tuple[Step, ...]:
    """Merge the steps found name by name: every group must be complete, every target made once."""
    groups = {step.key: step for step in steps.values()}
    made_from: dict[str, str] = {}
    for step in groups.values():
        if missing := [name for name in step.sources if name not in steps]:
            present = [name for name in step.sources if name in steps]
            raise FormatError(f"{at(where)}has {listed(present)} but not {listed(missing)}. Is it complete?")
        for target in step.targets:
            if target in made_from:
                raise FormatError(
                    f"{at(where)}{target!r} would be produced twice, from {made_from[target]!r} and "
                    f"{step.key!r}. Remove one of them from the source."
                )
            made_from[target] = step.key
    return tuple(groups.values())


def _fields(template: str) -> set[str]:
    return {name.lstrip("~") for name in _FIELD.findall(template)}


def _check_rule(rule: Rule) -> None:
    fields = _fields(rule.foreign)
    for template in rule.into:
        if _fields(template) != fields:
            raise PluginError(f"{rule}: {template!r} needs the fields of {rule.foreign!r}: {sorted(fields)}.")
    parts = sorted(part for own in rule.into.values() for part in own)
    if parts != list(range(rule.parts)):
        raise PluginError(
            f"{rule}: its targets list parts {parts}; each of 0..{rule.parts - 1} is needed once."
        )


def _filled(parts: Parts, values: Mapping[str, str]) -> Parts:
    return {template.format_map(values): own for template, own in parts.items()}


IDENTITY = Names((Rename("{rest}", "{rest}"),))
"""The table of a format whose names are the canonical ones."""
