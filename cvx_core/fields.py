"""One component's fields from plain recipe data to a typed config, with each problem at its line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cvx_core.config import Config, PathField, path_fields
from cvx_core.errors import PluginError, Problem, did_you_mean
from cvx_core.nesting import inner_configs, model_in
from cvx_core.recipe import Address, Recipe
from cvx_core.registry import Choice, Component, Registry

C = TypeVar("C", bound=Config)

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "path_type": "a path",
}


class FieldReader:
    """Reads components out of a recipe; problems are appended to the list it is given."""

    def __init__(self, recipe: Recipe, registry: Registry, problems: list[Problem]):
        self.recipe, self.registry, self.problems = recipe, registry, problems

    def choice(
        self,
        kind: str,
        address: Address,
        data: Any,
        fill: Mapping[str, Any] | None = None,
        weights: bool = False,
    ) -> Choice | None:
        """Resolve `{use: name, ...fields}`; `fill` gives values where neither the recipe nor the preset
        should.

        Returns None after reporting problems.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("use"), str):
            known = ", ".join(self.registry.names(kind))
            self._problem(address, f"got {data!r}; expected a mapping with `use:`, one of: {known}.")
            return None
        try:
            component = self.registry.get(kind, data["use"])
        except PluginError as error:
            self._problem((*address, "use"), str(error))
            return None
        fields = {key: value for key, value in data.items() if key != "use"}
        source = fields.pop("weights", None) if weights else None
        chosen = self._source((*address, "weights"), source) if source is not None else None
        config = self._config(component, address, fields, fill or {})
        if config is None or (source is not None and chosen is None):
            return None
        return Choice(component, config, chosen)

    def validate(self, model: type[C], address: Address, data: Mapping[str, Any], who: str) -> C | None:
        """Validate plain data strictly; paths are anchored first and must exist where the field says so."""
        before = len(self.problems)
        nested = self._components_in(model, address, data)
        plain = {key: value for key, value in data.items() if key not in nested}
        plain = self._anchored(model, address, plain)
        try:
            config = model.model_validate_json(json.dumps(plain), strict=True)
        except ValidationError as error:
            found: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
            for detail in error.errors(include_url=False):
                location = tuple(part for part in detail["loc"] if not _is_variant(part))
                found.setdefault(location, []).append(detail)
            for location, details in found.items():
                self._report(model, address, location, details, who)
            return None
        if len(self.problems) > before:
            return None
        return config.model_copy(update=nested) if nested else config

    def _components_in(
        self, model: type[Config], address: Address, data: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Resolve the fields that hold components, and those whose own fields do."""
        found: dict[str, Any] = {
            name: self.choice(kind, (*address, name), data[name])
            for name, kind in model.nested.items()
            if data.get(name) is not None
        }
        for name, kind in model.listed.items():
            items = data.get(name, model.model_fields[name].default)
            if isinstance(items, list | tuple):
                found[name] = tuple(
                    self.choice(kind, (*address, name, index), item) for index, item in enumerate(items)
                )
            else:
                self._problem(
                    (*address, name), f"got {items!r}; expected a list of mappings with `use:`, such as []."
                )
                found[name] = ()
        for name, inner in inner_configs(model).items():
            if isinstance(data.get(name), Mapping):
                found[name] = self.validate(inner, (*address, name), data[name], repr(name))
        return found

    def _source(self, address: Address, data: Any) -> Choice | None:
        """Resolve where weights come from; a format without a path reads nothing."""
        chosen = self.choice("format", address, data)
        if chosen is not None and getattr(chosen.config, "path", "") is None:
            self._problem(address, "needs a path. Add `path:` with the folder or file of the weights.")
            return None
        return chosen

    def _config(
        self, component: Component, address: Address, fields: dict[str, Any], fill: Mapping[str, Any]
    ) -> Config | None:
        model = component.config
        if model is None:
            self._problem(address, f"{component.name!r} takes no fields and cannot be used here.")
            return None
        filled = {
            key: value for key, value in fill.items() if key in model.model_fields and key not in fields
        }
        data = _overlay({**component.preset, **filled}, fields)
        return self.validate(model, address, data, repr(component.name))

    def _anchored(self, model: type[BaseModel], address: Address, data: dict[str, Any]) -> dict[str, Any]:
        result = dict(data)
        for name, field in path_fields(model).items():
            value = data.get(name)
            if isinstance(value, list):
                result[name] = [self._anchor((*address, name, i), v, field) for i, v in enumerate(value)]
            elif value is not None:
                result[name] = self._anchor((*address, name), value, field)
        for name, value in data.items():
            info = model.model_fields.get(name)
            inner = model_in(info.annotation) if info is not None else None
            if inner is not None and isinstance(value, dict):
                result[name] = self._anchored(inner, (*address, name), value)
        return result

    def _anchor(self, address: Address, value: Any, field: PathField) -> Any:
        if not isinstance(value, str) or value in field.words:
            return value
        path = Path(os.path.normpath(self.recipe.base_of(address) / Path(value).expanduser()))
        if field.must_exist and not path.exists():
            at_recipe = self.recipe.base_of(address) == self.recipe.base
            start = "the recipe's folder" if at_recipe else "the working directory"
            self._problem(address, f"no such file or folder: {path}. Relative paths start at {start}.")
        return str(path)

    def _report(
        self,
        model: type[Config],
        address: Address,
        location: tuple[str | int, ...],
        details: list[ErrorDetails],
        who: str,
    ) -> None:
        """Add one problem for a field; it has several details where it may be of several types."""
        at, detail = (*address, *location), details[0]
        kind, got = detail["type"], detail.get("input")
        if kind == "extra_forbidden" and location[0] in model.foreign and len(location) == 1:
            self._problem(at, f"{who} has no such field: {model.foreign[str(location[0])]}")
        elif kind == "extra_forbidden":
            options = _fields_at(model, location[:-1])
            self._problem(at, f"{who} has no such field.{did_you_mean(str(location[-1]), options)}")
        elif kind == "missing":
            self._problem(at, "is required.")
        elif kind in ("value_error", "assertion_error"):
            self._problem(at, str(detail["ctx"]["error"]))
        else:
            expected = " or ".join(dict.fromkeys(map(_expected, details))).replace(" or expected", " or")
            options = [option for item in details for option in _options(item)]
            self._problem(at, f"got {got!r}; {expected}.{did_you_mean(str(got), options)}")

    def _problem(self, address: Address, message: str) -> None:
        self.problems.append(self.recipe.problem(address, message))


def _expected(detail: ErrorDetails) -> str:
    if detail["type"] == "literal_error":
        return f"expected {detail['ctx']['expected']}"
    if detail["type"] == "too_short":
        return f"expected a list of at least {detail['ctx']['min_length']}"
    if detail["type"] in _EXPECTED:
        return f"expected {_EXPECTED[detail['type']]}"
    message = detail["msg"].replace("Input should be ", "expected a value ")
    return f"{message[0].lower()}{message[1:]}"


def _options(detail: ErrorDetails) -> list[str]:
    """Return the words that a field takes."""
    if detail["type"] != "literal_error":
        return []
    expected: str = detail["ctx"]["expected"]
    return [option.strip("'") for option in expected.replace(" or ", ", ").split(", ")]


def _overlay(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _overlay(dict(result[key]), value) if both else value
    return result


def _is_variant(part: str | int) -> bool:
    """Tell whether a location part is pydantic's name of a union member rather than a field or index."""
    if not isinstance(part, str):
        return False
    return part != part.lower() or "[" in part or part in _UNION_TAGS or part.startswith("constrained-")


_UNION_TAGS = {"int", "float", "str", "bool", "path", "none"}


def _fields_at(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """Return the field names of the (possibly nested) model at a location."""
    current: Any = model
    for part in location:
        info = current.model_fields.get(part) if isinstance(part, str) else None
        nested = model_in(info.annotation) if info is not None else None
        if nested is None:
            return []
        current = nested
    return list(current.model_fields)
