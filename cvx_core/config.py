"""The base of every typed config: frozen, unknown fields forbidden, free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from cvx_core.errors import Problem
    from cvx_core.spec import Spec


class PathRole:
    """Marks a path field, so that resolving a recipe can anchor it to the recipe's folder."""

    def __init__(self, must_exist: bool):
        self.must_exist = must_exist


InputPath = Annotated[Path, PathRole(must_exist=True)]
OutputPath = Annotated[Path, PathRole(must_exist=False)]

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Config(BaseModel):
    """Typed fields of one component, kept beside the code that uses them.

    Subclasses state fields with defaults, so that every config can be constructed bare. A field that holds
    another component is named in `nested` with its kind; resolving fills it with a `Choice`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        validate_default=True,
    )

    nested: ClassVar[Mapping[str, str]] = {}

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield the problems this component has with the rest of the recipe; paths are relative to it."""
        return ()


def path_fields(config: type[BaseModel]) -> dict[str, PathRole]:
    """Return the fields of a config that hold a path (alone, optional or in a tuple), with their role."""
    return {
        name: role
        for name, field in config.model_fields.items()
        if (role := _find_role([field.annotation, *field.metadata])) is not None
    }


def _find_role(annotations: Iterable[Any]) -> PathRole | None:
    for annotation in annotations:
        if isinstance(annotation, PathRole):
            return annotation
        inner = [*getattr(annotation, "__args__", ()), *getattr(annotation, "__metadata__", ())]
        if inner and (role := _find_role(inner)) is not None:
            return role
    return None
