"""The base of every typed config: frozen, unknown fields forbidden, free of torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

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
    another component is named in `nested` with its kind; resolving fills it with a `Choice`. One that holds
    a list of them is named in `listed`; it is filled with a tuple, and its default is what a recipe would
    state.
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
    listed: ClassVar[Mapping[str, str]] = {}
    foreign: ClassVar[Mapping[str, str]] = {}
    """{field that others have where this has none: why, and what to do instead}"""
    also_called: ClassVar[Mapping[str, str]] = {}
    """{name that others give to this: what to write here}, for a component that is looked for under it"""

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield the problems this component has with the rest of the recipe; paths are relative to it."""
        return ()

    def limits(self, spec: Spec) -> Mapping[str, Container[int]]:
        """Return {axis of the mesh, or axes used as one: numbers of ranks that this component goes with}.

        Proposals keep to them, where a mesh does not multiply out; it is `check` that refuses other numbers.
        """
        return {}


class PathField(NamedTuple):
    """A field that holds a path. words: values that are not paths, such as `auto`."""

    must_exist: bool
    words: frozenset[str]


def path_fields(config: type[BaseModel]) -> dict[str, PathField]:
    """Return the fields of a config that hold a path, alone, optional or in a tuple."""
    result = {}
    for name, info in config.model_fields.items():
        parts = list(_parts([info.annotation, *info.metadata]))
        roles = [part for part in parts if isinstance(part, PathRole)]
        if roles:
            words = frozenset(part for part in parts if isinstance(part, str))
            result[name] = PathField(roles[0].must_exist, words)
    return result


def _parts(annotations: Iterable[Any]) -> Iterator[Any]:
    """Yield annotations with everything inside them: union members, metadata, literal values."""
    for annotation in annotations:
        yield annotation
        yield from _parts([*getattr(annotation, "__args__", ()), *getattr(annotation, "__metadata__", ())])
