"""What somebody wants converted, and the configs that their settings make. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cvx_core.errors import FormatError, did_you_mean
from cvx_core.registry import Component

Settings = Mapping[str, Any]
SIDES = {"--set": ("--set-from", "to_read"), "--set-from": ("--set", "to_write")}
"""{option: the other one, and where a format's config lists the fields that only that one has a use for}."""


@dataclass(frozen=True)
class Request:
    """One conversion.

    to: the format to write; source_format, model: overrule what is found out; settings, source_settings,
    model_settings: fields of the target format, the source format and the model; dtype: what floating point
    tensors become; lora: LoRA weights to merge, scaled by `scale`; alpha: of a LoRA that does not state it;
    overwrite: replace what is at the target.
    """

    source: Path
    target: Path
    to: str
    source_format: str | None = None
    model: str | None = None
    settings: Settings = field(default_factory=dict)
    source_settings: Settings = field(default_factory=dict)
    model_settings: Settings = field(default_factory=dict)
    dtype: str | None = None
    lora: Path | None = None
    scale: float = 1.0
    alpha: float | None = None
    overwrite: bool = False


@contextmanager
def naming(request: Request, path: Path | None = None) -> Iterator[None]:
    """Put a path, the source's by default, before a FormatError that begins with no path and no option."""
    paths = (request.source, request.target, request.lora, request.model)
    try:
        yield
    except FormatError as error:
        if str(error).startswith(("--", *(str(known) for known in paths if known is not None))):
            raise
        raise FormatError(f"{path or request.source}: {error}") from error


def configured(component: Component, fields: Settings, option: str) -> Any:
    """Return a component's config. Raises FormatError naming the option of each field that is wrong."""
    model = component.config
    assert model is not None
    _check_side(component, fields, option)
    try:
        return model.model_validate_json(json.dumps({**component.preset, **fields}, default=str), strict=True)
    except ValidationError as error:
        wrong: dict[str, list[Mapping[str, Any]]] = {}
        for detail in error.errors(include_url=False):
            wrong.setdefault(str(detail["loc"][0]) if detail["loc"] else "", []).append(dict(detail))
        lines = [_line(component, name, details, fields, option) for name, details in wrong.items()]
        raise FormatError("\n".join(lines)) from error


def _check_side(component: Component, fields: Settings, option: str) -> None:
    """Raise FormatError on fields that would do nothing: paths, and what is for the other direction."""
    if option not in SIDES:
        return
    if "path" in fields:
        raise FormatError(f"{option} path: paths are SRC and DST. Leave it out.")
    other, what = SIDES[option]
    if idle := [name for name in fields if name in getattr(component.config, what, ())]:
        raise FormatError(f"{option} {idle[0]}: does nothing here. Give it with {other}, or leave it out.")


def _line(
    component: Component, name: str, details: list[Mapping[str, Any]], fields: Settings, option: str
) -> str:
    assert component.config is not None
    known = component.config.model_fields
    detail = details[0]
    if detail["type"] == "extra_forbidden":
        near = did_you_mean(name, known)
        listed = ", ".join(sorted(known))
        return f"{option} {name}: {component.name!r} has no such field.{near} Fields: {listed}."
    message = detail["ctx"]["error"] if detail["type"] == "value_error" else detail["msg"]
    if len(details) > 1 or len(detail["loc"]) > 1:
        meaning = known[name].description or "Another value is needed."
        return f"{option} {name}: got {fields.get(name)!r}; {message}. {' '.join(meaning.split())}"
    return f"{option} {name}: got {detail.get('input')!r}; {message}."
