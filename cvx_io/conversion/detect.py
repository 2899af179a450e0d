"""Which format a path is of, and which model its tensors are. No torch, but where plugins need it to look."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cvx_core.errors import CvxError, FormatError, PluginError
from cvx_core.interfaces import Format, Inferred, Tensors
from cvx_core.registry import Component, Registry
from cvx_io.atomic import is_left_over, read_json
from cvx_io.conversion.request import Settings, configured
from cvx_io.rename import Names, NamesError
from cvx_io.tensors.dcp import SUFFIX
from cvx_io.tensors.dcp_metadata import METADATA, read_checkpoint
from cvx_io.tensors.header import read_header
from cvx_io.tensors.pickles import load_pickle

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
"""What files of torch.save end in."""
MODELS = ("predictor", "autoencoder", "text_encoder")
"""Kinds of components that have weights."""


@dataclass(frozen=True)
class Model:
    """The model that weights are of. assumed, unknown: as in Inferred; family: of its names tables."""

    family: str
    component: Component | None = None
    config: Any = None
    assumed: Mapping[str, Any] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)
    evidence: str = ""

    @property
    def name(self) -> str:
        """The name of its component, or of its family where nothing more is known."""
        return self.component.name if self.component is not None else self.family


def find_format(path: Path, registry: Registry, name: str | None = None) -> Component:
    """Return the format of a path, or the one named.

    Raises FormatError where no format or more than one recognises the path; then it lists what lies inside.
    """
    if not path.exists():
        raise FormatError(f"{path}: no such file or folder. Check the path.")
    if is_left_over(path):
        raise FormatError(
            f"{path}: left over from an interrupted write, so it may be half written. Write it again; what "
            "ends in .old is what stood there before, and can be renamed."
        )
    if name is not None:
        return registry.get("format", name)
    found = formats_of(path, registry)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(component.name for component in found)
        raise FormatError(f"{path}: could be any of {names}. Say which with --from.")
    inside = _inside(path, registry)
    if inside:
        listed = "\n".join(f"  {item} ({name})" for item, name in inside)
        raise FormatError(
            f"{path}: not the weights of one model, but it holds:\n{listed}\nConvert one of them."
        )
    if path.is_dir() and not any(path.iterdir()):
        raise FormatError(f"{path}: an empty folder. Check the path and that the download is complete.")
    _read_on_trial(path)
    known = ", ".join(component.name for component in _formats(registry))
    raise FormatError(
        f"{path}: of no format that is known ({known}). Check the path and that the download is "
        "complete, or say what it is with --from."
    )


def formats_of(path: Path, registry: Registry) -> list[Component]:
    """Return the formats that accept a path; none accepts what an interrupted write left."""
    if is_left_over(path):
        return []
    return [component for component in _formats(registry) if _accepts(component, path)]


def _read_on_trial(path: Path) -> None:
    """Raise FormatError with what is wrong where the name promises weights that no format makes out."""
    if path.suffix == ".safetensors":
        read_header(path)
    elif path.suffix in PICKLES:
        tree = load_pickle(path)
        if not isinstance(tree, Mapping):
            raise FormatError(
                f"{path}: holds {tree!r:.80}, no mapping from names to tensors. Save a state_dict()."
            )
    elif (path / METADATA).exists() or any(path.glob(f"*{SUFFIX}")):
        read_checkpoint(path)


def is_canonical(component: Component) -> bool:
    """Tell whether names in a format's files are ours without a table."""
    return bool(getattr(component.config, "canonical", False))


def tables(registry: Registry, format_name: str) -> Iterator[tuple[str, Names]]:
    """Yield (family, table) of every family that has names in a format."""
    for name in registry.names("names"):
        family, _, owner = name.rpartition(":")
        if owner == format_name:
            yield family, registry.get("names", name).load()


def open_source(
    path: Path, fmt: Format, component: Component, registry: Registry, named: Model | None
) -> tuple[Tensors, Model | None]:
    """Open weights with the table that fits them, and tell what they are.

    named: the model that the user named, if so. The model is None where nothing recognises the tensors.
    Raises FormatError with what the closest table lacks.
    """
    if named is not None:
        return fmt.open(path, registry.table(named.family, component)), named
    failures: list[NamesError] = []
    for family, table in tables(registry, component.name):
        try:
            tensors = fmt.open(path, table)
        except NamesError as error:
            failures.append(error)
            continue
        return tensors, recognise(tensors, registry, family) or _named_only(path, family, component, registry)
    if is_canonical(component):
        tensors = fmt.open(path)
        return tensors, recognise(tensors, registry)
    if failures:
        raise min(failures, key=lambda error: error.unmatched)
    raise FormatError(f"no names tables for {component.name!r}. Install a plugin that has one.")


def _named_only(path: Path, family: str, fmt: Component, registry: Registry) -> Model:
    """Return a model known by its names. Raises FormatError where its shapes ought to tell more."""
    able = [component for component in _unique(registry) if _family(component) == family]
    is_model = getattr(fmt.config, "holds", "") != "lora"
    if is_model and any(hasattr(component.config, "infer") for component in able):
        raise FormatError(
            f"{path}: has names of {family!r}, but the shapes of none of its models, as where tensors are "
            "missing or damaged. Are all files there? With --model PRESET, what is missing is listed."
        )
    return Model(family, evidence="names")


def name_model(name: str, settings: Settings, registry: Registry) -> Model:
    """Return the model that `--model` means: a component, or a config.json. Raises FormatError otherwise."""
    path = Path(name)
    if path.suffix == ".json" or path.is_dir():
        file = path / "config.json" if path.is_dir() else path
        found = _from_config(read_json(file), registry, str(file))
        if found is None:
            raise FormatError(f"{file}: describes no model that an installed component recognises.")
        return _model(*found, settings, str(file))
    kinds = [kind for kind in MODELS if name in registry.names(kind)]
    if not kinds:
        try:
            registry.get("predictor", name)
        except PluginError as error:
            raise FormatError(f"--model: {error}") from error
    component = registry.get(kinds[0], name)
    return _model(component, Inferred({}), settings, "--model")


def recognise(tensors: Tensors, registry: Registry, family: str | None = None) -> Model | None:
    """Return the model that tensors are of, by the config beside them or by their shapes."""
    described = tensors.facts.get("config")
    if isinstance(described, Mapping):
        found = _from_config(described, registry, "config.json")
        if found is not None:
            return _model(*found, {}, "config.json")
    for component in _unique(registry):
        infer = getattr(component.config, "infer", None)
        if infer is None or family not in (None, _family(component)):
            continue
        try:
            inferred: Inferred | None = infer(tensors)
        except (ArithmeticError, LookupError, TypeError, ValueError):  # shapes that no model has
            continue
        if inferred is not None:
            named = registry.get(component.kind, inferred.fields["use"])
            return _model(named, inferred, {}, "shapes")
    return None


def settle(model: Model, settings: Settings) -> Model:
    """Return a model with fields that the user states, which are then no longer open."""
    if not settings or model.component is None:
        return model
    fields = {name: getattr(model.config, name) for name in model.config.model_fields_set}
    stated = Inferred(fields, model.assumed, model.unknown)
    return _model(model.component, stated, settings, model.evidence)


def _model(component: Component, found: Inferred, settings: Settings, evidence: str) -> Model:
    assumed = {name: value for name, value in found.assumed.items() if name not in settings}
    usual = {name: value for name, (value, _) in found.assumed.items()}
    fields = {**usual, **{name: value for name, value in found.fields.items() if name != "use"}, **settings}
    config = configured(component, _plain(fields), "--set-model")
    unknown = {name: why for name, why in found.unknown.items() if name not in settings}
    return Model(_family(component), component, config, assumed, unknown, evidence)


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _jsonable(value) for name, value in fields.items()}


def _jsonable(value: Any) -> Any:
    return json.loads(value.model_dump_json()) if hasattr(value, "model_dump_json") else value


def _from_config(
    described: Mapping[str, Any], registry: Registry, where: str
) -> tuple[Component, Inferred] | None:
    for component in _unique(registry):
        ask = getattr(component.config, "recognise", None)
        try:
            fields = ask(described) if ask is not None else None
        except (LookupError, TypeError, ValueError) as error:
            why = [f"{detail['loc']}: {detail['msg']}" for detail in getattr(error, "errors", list)()]
            raise FormatError(
                f"{where}: describes no valid {component.name}: {'; '.join(why) or repr(error)}. Correct it."
            ) from error
        if fields is not None:
            return registry.get(component.kind, fields["use"]), Inferred(fields)
    return None


def _family(component: Component) -> str:
    return str(getattr(component.config, "family", component.name))


def _unique(registry: Registry) -> list[Component]:
    """Return one component for each config class of each kind with weights."""
    found: dict[Any, Component] = {}
    for kind in MODELS:
        for component, _ in registry.all(kind):
            found.setdefault((kind, component.config), component)
    return list(found.values())


def _formats(registry: Registry) -> list[Component]:
    return [component for component, _ in registry.all("format") if component.config is not None]


def _accepts(component: Component, path: Path) -> bool:
    assert component.config is not None
    try:
        return bool(component.load()(component.config(), None).accepts(path))
    except CvxError:  # a plugin that cannot be imported; --from says so
        return False


def _inside(path: Path, registry: Registry) -> list[tuple[Path, str]]:
    """Return what some format recognises in a folder, two levels deep."""
    if not path.is_dir():
        return []
    found: list[tuple[Path, str]] = []
    for item in sorted([*path.glob("*"), *path.glob("*/*")]):
        if item.parent in (known for known, _ in found):
            continue
        with suppress(OSError):  # what cannot be read is not offered
            found += [(item, component.name) for component in formats_of(item, registry)[:1]]
    return found
