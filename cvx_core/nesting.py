"""Components inside a component's fields: which fields hold some, at any depth, and what they hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from cvx_core.config import Config
from cvx_core.registry import Choice


def model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model that a field's type is, or may be; None where there is none."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
    return models[0] if models else None


def inner_configs(config: type[BaseModel]) -> dict[str, type[Config]]:
    """Return the fields that are configs with components in them."""
    found = {name: model_in(field.annotation) for name, field in config.model_fields.items()}
    return {
        name: model
        for name, model in found.items()
        if model is not None and issubclass(model, Config) and _holds_components(model)
    }


def choices_in(config: Any) -> Iterator[Choice]:
    """Yield the components that a config's fields hold; not those inside these."""
    for name in type(config).model_fields if isinstance(config, BaseModel) else ():
        value = getattr(config, name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Choice):
                yield item
            elif isinstance(item, Config):
                yield from choices_in(item)


def stated(config: Config) -> dict[str, Any]:
    """Return a config's fields as a recipe states them, every one."""
    data: dict[str, Any] = {}
    inner, plain = inner_configs(type(config)), set()
    for name in type(config).model_fields:
        value = data[name] = getattr(config, name)
        if isinstance(value, Choice):
            data[name] = stated_choice(value)
        elif name in config.listed:
            data[name] = [stated_choice(item) if isinstance(item, Choice) else dict(item) for item in value]
        elif name in inner and value is not None:
            data[name] = stated(value)
        else:
            plain.add(name)
    return data | json.loads(config.model_dump_json(include=plain))


def stated_choice(choice: Choice) -> dict[str, Any]:
    """Return a choice as a recipe states it, with every field."""
    data = {"use": choice.name, **stated(choice.config)}
    if choice.weights is not None:
        data["weights"] = stated_choice(choice.weights)
    return data


def _holds_components(config: type[Config]) -> bool:
    return bool(config.nested or config.listed or inner_configs(config))
