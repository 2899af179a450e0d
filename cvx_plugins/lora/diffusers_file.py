"""The LoRA files that diffusers pipelines load: `transformer.<module>.lora_A.weight`, alphas in metadata.

The pipelines' loader refuses `.alpha` tensors, so none are written. It has the ranks and alphas from the JSON
under `lora_adapter_metadata`; versions that do not know it would take each alpha for the rank.
Source: huggingface/diffusers src/diffusers/loaders/lora_base.py, lora_pipeline.py, peft.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvx_core import FormatError
from cvx_core.interfaces import Tensors
from cvx_io.atomic import atomic_file, atomic_folder
from cvx_io.lora_state import alphas_of, modules, stating, with_alpha
from cvx_io.tensors.safetensors import open_safetensors
from cvx_io.tensors.write import METADATA, write_file
from cvx_plugins.lora import LoraFileConfig
from cvx_plugins.lora.peft_config import alphas_in, config_of
from cvx_plugins.lora.spelling import DIFFUSERS, Spelling, prefix_in

FILE = "pytorch_lora_weights.safetensors"
KEY = "lora_adapter_metadata"
SPELLING = Spelling(DIFFUSERS)


class DiffusersLora:
    """The `diffusers-lora` format. LoRA modules have canonical names, so no names table applies."""

    def accepts(self, path: Path) -> bool:
        """Tell whether `path` is a LoRA file of a diffusers transformer, or a folder with one."""
        return prefix_in(_file(path)) == DIFFUSERS

    def open(self, path: Path, names: Any = None) -> Tensors:
        """Return the LoRA, with the alphas of its metadata or its tensors where there are any.

        Raises FormatError on other tensors, and on metadata that contradicts them.
        """
        file = _file(path)
        stored = open_safetensors(file)
        found = SPELLING.read(stored, str(file))
        config = _config(stored.facts, file)
        alphas = alphas_in(config, modules(found), str(file)) if config else {}
        return stating(found, alphas, str(file))

    def write(
        self, path: Path, tensors: Tensors, names: Any = None, config: Mapping[str, Any] | None = None
    ) -> None:
        """Write a folder with the file, or the file where `path` ends in .safetensors, whole or not at all.

        Raises FormatError where a module lacks its alpha.
        """
        tensors = with_alpha(tensors, None, str(path))
        stated = config_of(modules(tensors), alphas_of(tensors))
        text = json.dumps(
            {DIFFUSERS + name: value for name, value in stated.items()}, indent=2, sort_keys=True
        )
        metadata = {**METADATA, KEY: text}
        if path.suffix == ".safetensors":
            with atomic_file(path) as partial:
                write_file(partial, SPELLING.write(tensors), metadata=metadata)
            return
        with atomic_folder(path, manifest=FILE) as partial:
            write_file(partial / FILE, SPELLING.write(tensors), metadata=metadata)


def diffusers_lora(_cfg: LoraFileConfig, _deps: Any) -> DiffusersLora:
    """Build the format; it needs nothing."""
    return DiffusersLora()


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def _config(facts: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the LoraConfig fields of the transformer in a file's metadata; empty where it has none."""
    if KEY not in facts:
        return {}
    try:
        stated = json.loads(facts[KEY])
        own = {
            name.removeprefix(DIFFUSERS): value
            for name, value in stated.items()
            if name.startswith(DIFFUSERS)
        }
    except (ValueError, AttributeError) as error:
        raise FormatError(f"{file}: {KEY} in its metadata cannot be read: {error}. Export again.") from error
    if not own:
        raise FormatError(f"{file}: {KEY} in its metadata says nothing of the transformer. Export again.")
    return own
