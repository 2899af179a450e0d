"""What somebody wants converted, and the configs that their settings make. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cvx_core.config import Config
from cvx_core.errors import FormatError, did_you_mean
from cvx_core.registry import Component

Settings = Mapping[str, Any]


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
    try:
        return model.model_validate_json(json.dumps({**component.preset, **fields}), strict=True)
    except ValidationError as error:
        lines = [
            _line(model, component.name, option, dict(detail)) for detail in error.errors(include_url=False)
        ]
        raise FormatError("\n".join(lines)) from error


def _line(model: type[Config], name: str, option: str, detail: Mapping[str, Any]) -> str:
    field_name = str(detail["loc"][0]) if detail["loc"] else ""
    if detail["type"] == "extra_forbidden":
        known = ", ".join(sorted(model.model_fields))
        near = did_you_mean(field_name, model.model_fields)
        return f"{option} {field_name}: {name!r} has no such field.{near} Fields: {known}."
    message = detail["ctx"]["error"] if detail["type"] == "value_error" else detail["msg"]
    return f"{option} {field_name}: got {detail.get('input')!r}; {message}."
