"""PEFT's folders: adapter_config.json with `base_model.model.<module>.lora_A.weight` in safetensors.

Source: huggingface/peft src/peft/peft_model.py, utils/save_and_load.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cvx_core import FormatError
from cvx_core.interfaces import Tensors
from cvx_io.atomic import atomic_folder, read_json
from cvx_io.lora_state import alphas_of, modules, stating, with_alpha
from cvx_io.tensors.safetensors import open_safetensors
from cvx_io.tensors.write import write_file
from cvx_plugins.lora import LoraFileConfig
from cvx_plugins.lora.peft_config import alphas_in, check_targets, config_of
from cvx_plugins.lora.spelling import PEFT, Spelling, prefix_in

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SPELLING = Spelling(PEFT)
FIXED = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
}
"""Fields of the config that are the same for every adapter written."""


class Peft:
    """The `peft` format. LoRA modules have canonical names, so no names table applies."""

    def accepts(self, path: Path) -> bool:
        """Tell whether `path` is a PEFT folder with a LoRA, or the weight file in one."""
        return prefix_in(_file(path)) == PEFT

    def open(self, path: Path, names: Any = None) -> Tensors:
        """Return the LoRA with its alphas; the facts hold the folder's adapter_config.json.

        Raises FormatError on variants of LoRA, and on a config that contradicts the tensors.
        """
        file = _file(path)
        config = read_json(file.with_name(CONFIG))
        found = SPELLING.read(open_safetensors(file), str(file))
        shapes, where = modules(found), str(file.with_name(CONFIG))
        alphas = alphas_in(config, shapes, where)
        check_targets(config, shapes, where)
        return replace(stating(found, alphas, where), facts={**found.facts, "adapter_config": config})

    def write(
        self, path: Path, tensors: Tensors, names: Any = None, config: Mapping[str, Any] | None = None
    ) -> None:
        """Write a folder, whole or not at all. Raises FormatError where a module lacks its alpha."""
        foreign, stated = self._plan(path, tensors)
        with atomic_folder(path, manifest=CONFIG, stale=["adapter_model*"]) as partial:
            write_file(partial / FILE, foreign)
            text = json.dumps(stated, indent=2, sort_keys=True)
            (partial / CONFIG).write_text(text + "\n", encoding="utf-8")

    def check(self, path: Path, tensors: Tensors, names: Any = None) -> None:
        """Raise FormatError where `write` would, before anything is written."""
        self._plan(path, tensors)

    def _plan(self, path: Path, tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
        """Return what the file of weights will hold, and what the config states."""
        if path.suffix == ".safetensors":
            raise FormatError(f"{path}: peft is a folder of two files. Give the path of a folder.")
        tensors = with_alpha(tensors, None, str(path))
        return SPELLING.write(tensors), {**FIXED, **config_of(modules(tensors), alphas_of(tensors))}


def peft_folder(_cfg: LoraFileConfig, _deps: Any) -> Peft:
    """Build the format; it needs nothing."""
    return Peft()


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path
