"""From a diffusers pipeline folder to recipe sections: components of each kind are shown the sub-folders.

A config class recognises a foreign config.json by a classmethod `recognise(foreign) -> fields | None`; the
fields name the component, which may be a preset, under `use`. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cvx_core import FormatError, PluginError
from cvx_core.interfaces import Piece
from cvx_core.registry import Registry
from cvx_io.atomic import read_json
from cvx_io.tensors.shards import has_weights

SECTION_OF = {
    "scheduler": "scheduler",
    "text_encoder": "text_encoder",
    "transformer": "predictor",
    "vae": "autoencoder",
}
"""{sub-folder: recipe section, which is also the component kind}."""
FOLDER_OF = {section: folder for folder, section in SECTION_OF.items()}
TOKENIZER = "tokenizer"
INDEX = "model_index.json"
TOKENIZER_FILES = ("spiece.model", "tokenizer.json")
CONFIG_FILES = ("config.json", "scheduler_config.json")


def sections(path: Path, registry: Registry) -> tuple[dict[str, Any], list[str]] | None:
    """Return recipe sections and notes for a folder of a pipeline or one component; None for anything else.

    Raises FormatError on a sub-folder that is incomplete or that nobody recognises.
    """
    path = path.absolute()
    if (path / INDEX).is_file():
        return _pipeline(path, registry)
    if _config_file(path) is not None:
        return _bare(path, registry)
    return None


def index_of(pieces: Mapping[str, Piece]) -> dict[str, Any]:
    """Return the model_index.json of parts by recipe section: the class of each, and the pipeline's own."""
    index: dict[str, Any] = {}
    for section, piece in pieces.items():
        if pipeline := piece.config.get("_pipeline"):
            index["_class_name"] = pipeline
        library = "diffusers" if "_class_name" in piece.config else "transformers"
        index[FOLDER_OF[section]] = [library, _foreign_class(piece.config)]
        if piece.tokenizer is not None:
            index[TOKENIZER] = ["transformers", "T5Tokenizer"]
    return index


def _pipeline(path: Path, registry: Registry) -> tuple[dict[str, Any], list[str]]:
    index = read_json(path / INDEX)
    listed = {name: entry for name, entry in index.items() if _is_component(name, entry)}
    if unknown := sorted(listed.keys() - SECTION_OF.keys() - {TOKENIZER}):
        known = ", ".join((*SECTION_OF, TOKENIZER))
        raise FormatError(
            f"{path / 'model_index.json'}: lists {', '.join(unknown)}; only {known} can be used. "
            "State the parts of this model one by one in the recipe."
        )
    found: dict[str, Any] = {}
    notes: list[str] = []
    for name, section in SECTION_OF.items():
        if not (path / name).is_dir():
            notes.append(f"{section}: left out, {path} has no folder {name!r}")
            continue
        file = _config_file(path / name)
        if file is None:
            raise FormatError(f"{path / name}: has no {' or '.join(CONFIG_FILES)}. Is the download complete?")
        foreign = read_json(file)
        fields = _recognise(foreign, section, registry)
        if fields is None:
            raise _unrecognised(file, foreign, [section], registry)
        found[section] = _with_weights(fields, section, path / name)
        notes.append(f"{section}: {name}/{file.name} ({_foreign_class(foreign)}) is {fields['use']!r}")
    _add_tokenizer(found, [path / TOKENIZER], notes)
    _set_image_latent(found, path / "vae", registry, notes)
    return found, notes


def _bare(path: Path, registry: Registry) -> tuple[dict[str, Any], list[str]]:
    file = _config_file(path)
    assert file is not None
    foreign = read_json(file)
    for section in SECTION_OF.values():
        fields = _recognise(foreign, section, registry)
        if fields is not None:
            found = {section: _with_weights(fields, section, path)}
            notes = [f"{section}: {file} ({_foreign_class(foreign)}) is {fields['use']!r}"]
            _add_tokenizer(found, [path.parent / TOKENIZER, path], notes)
            return found, notes
    raise _unrecognised(file, foreign, SECTION_OF.values(), registry)


def _recognise(foreign: Mapping[str, Any], kind: str, registry: Registry) -> dict[str, Any] | None:
    """Ask each config class of a kind, presets share one, and return the fields of the first that agrees."""
    for config in dict.fromkeys(component.config for component in _able(kind, registry)):
        fields = config.recognise(foreign)
        if fields is None:
            continue
        if "use" not in fields:
            raise PluginError(
                f"{config.__name__}.recognise must name the component under 'use'; got {dict(fields)}."
            )
        return dict(fields)
    return None


def _able(kind: str, registry: Registry) -> list[Any]:
    return [component for component, _ in registry.all(kind) if hasattr(component.config, "recognise")]


def _with_weights(fields: dict[str, Any], section: str, folder: Path) -> dict[str, Any]:
    if section == "scheduler":
        return fields
    if not has_weights(folder):
        raise FormatError(f"{folder}: has a config but no weights. Is the download complete?")
    return {**fields, "weights": {"use": "hf", "path": str(folder)}}


def _add_tokenizer(found: dict[str, Any], folders: list[Path], notes: list[str]) -> None:
    """Point the text encoder at the first folder with a tokenizer; None, without one, asks for it."""
    if "text_encoder" not in found:
        return
    holding = [folder for folder in folders if any((folder / name).is_file() for name in TOKENIZER_FILES)]
    found["text_encoder"][TOKENIZER] = str(holding[0]) if holding else None
    if not holding:
        notes.append(f"text_encoder: no tokenizer in {folders[0]}, so the recipe has to name one")


def _set_image_latent(found: dict[str, Any], vae: Path, registry: Registry, notes: list[str]) -> None:
    """Follow the autoencoder's say on how an image condition is scaled, where the predictor takes one."""
    if "predictor" not in found or "autoencoder" not in found:
        return
    fields = {name: value for name, value in found["predictor"].items() if name not in ("use", "weights")}
    component = registry.get("predictor", found["predictor"]["use"])
    assert component.config is not None
    try:
        config = component.config(**{**component.preset, **fields})
    except ValidationError as error:
        raise FormatError(
            f"{vae.parent / 'transformer'}: {component.name!r} cannot take its config: {error}"
        ) from error
    rules = getattr(config, "rules", None)
    usual = rules().image_latent if rules is not None else "none"
    foreign = read_json(vae / "config.json")
    stated = "divided" if foreign.get("invert_scale_latents") else "scaled"
    if usual not in ("none", stated):
        found["predictor"]["card"] = {**found["predictor"].get("card", {}), "image_latent": stated}
        notes.append(f"predictor: image latents are {stated}, as vae/config.json says")


def _unrecognised(
    file: Path, foreign: Mapping[str, Any], kinds: Iterable[str], registry: Registry
) -> FormatError:
    able = [f"{kind} {component.name!r}" for kind in kinds for component in _able(kind, registry)]
    return FormatError(
        f"{file}: no component recognises {_foreign_class(foreign)!r}. Able to recognise their own files: "
        f"{', '.join(able) or 'none'}. Install a plugin for it, or state this part in the recipe."
    )


def _foreign_class(foreign: Mapping[str, Any]) -> str:
    return str(
        foreign.get("_class_name") or ", ".join(foreign.get("architectures") or ["a model without a class"])
    )


def _config_file(folder: Path) -> Path | None:
    return next((folder / name for name in CONFIG_FILES if (folder / name).is_file()), None)


def _is_component(name: str, entry: Any) -> bool:
    """Tell a [library, class] entry from a setting such as _class_name, and from a part that is null."""
    return not name.startswith("_") and isinstance(entry, list) and any(entry)
