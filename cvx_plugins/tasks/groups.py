"""Parameters sorted into the groups of a recipe by patterns of their names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from cvx_core.errors import CvxError
from cvx_core.interfaces import ParamGroup


def grouped(
    named: Sequence[tuple[str, Tensor]], groups: Sequence[Any], elsewhere: Collection[str] = ()
) -> list[ParamGroup]:
    """Return parameter groups, those that no pattern matches first.

    groups: each with `match`, a pattern, and `options`; a parameter goes to the first that matches.
    elsewhere: names of parameters that other ranks hold.
    Raises CvxError where a group gets no parameter on any rank.
    """
    taken: list[list[tuple[str, Tensor]]] = [[] for _ in groups]
    rest: list[tuple[str, Tensor]] = []
    for name, param in named:
        place = _first(name, groups)
        (rest if place is None else taken[place]).append((name, param))
    others = {_first(name, groups) for name in elsewhere}
    for number, params in enumerate(taken):
        if not params and number not in others:
            raise CvxError(_nothing(number, [name for name, _ in named], groups))
    parts = [ParamGroup(rest, {})]
    parts += [ParamGroup(params, group.options) for group, params in zip(groups, taken, strict=True)]
    return [part for part in parts if part.params]


def _first(name: str, groups: Sequence[Any]) -> int | None:
    return next((i for i, group in enumerate(groups) if fnmatchcase(name, group.match)), None)


def _nothing(number: int, names: Sequence[str], groups: Sequence[Any]) -> str:
    pattern = groups[number].match
    shadowed = next((name for name in names if fnmatchcase(name, pattern)), None)
    if shadowed is not None:
        earlier = groups[_first(shadowed, groups) or 0].match
        why = f"all that it matches goes to {earlier!r} before it. Put it first, or remove it."
    else:
        why = f"no trained parameter has such a name, among them {', '.join(map(repr, names[:3]))}."
    return f"optimizer.groups[{number}].match: {pattern!r} gets no parameter: {why}"
