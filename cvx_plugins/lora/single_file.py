"""LoRAs in one safetensors file with alpha tensors: ComfyUI's layout and kohya's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvx_core import FormatError
from cvx_core.interfaces import Tensors
from cvx_io.atomic import atomic_file
from cvx_io.lora_state import ALPHA, A, B, alphas_of, modules, stating, with_alpha
from cvx_io.tensors.safetensors import open_safetensors
from cvx_io.tensors.write import METADATA, write_file
from cvx_plugins.lora import LoraFileConfig
from cvx_plugins.lora.kohya_names import from_kohya, to_kohya
from cvx_plugins.lora.peft_config import plain
from cvx_plugins.lora.spelling import COMFYUI, KOHYA, Spelling, prefix_in


class SingleFile:
    """A LoRA file. LoRA modules have canonical names, so no names table applies.

    network: whether the metadata states rank and alpha of the whole, as kohya's scripts do.
    """

    def __init__(self, spelling: Spelling, network: bool = False):
        self.spelling, self.network = spelling, network

    def accepts(self, path: Path) -> bool:
        """Tell whether `path` is a LoRA file in this layout."""
        return prefix_in(path) == self.spelling.prefix

    def open(self, path: Path, names: Any = None) -> Tensors:
        """Return the LoRA, with alphas where the file has any. Raises FormatError on other tensors."""
        stored = open_safetensors(path)
        found = self.spelling.read(stored, str(path))
        alpha = _network_alpha(stored.facts) if self.network else None
        missing = [module for module in modules(found) if module + ALPHA not in found.index]
        return stating(found, {} if alpha is None else dict.fromkeys(missing, alpha), str(path))

    def write(
        self, path: Path, tensors: Tensors, names: Any = None, config: Mapping[str, Any] | None = None
    ) -> None:
        """Write the file, whole or not at all. Raises FormatError where a module lacks its alpha."""
        foreign, metadata = self._plan(path, tensors)
        with atomic_file(path) as partial:
            write_file(partial, foreign, metadata=metadata)

    def check(self, path: Path, tensors: Tensors, names: Any = None) -> None:
        """Raise FormatError where `write` would, before anything is written."""
        self._plan(path, tensors)

    def _plan(self, path: Path, tensors: Tensors) -> tuple[Tensors, Mapping[str, str]]:
        """Return what the file will hold, and its metadata."""
        if path.suffix != ".safetensors":
            raise FormatError(f"{path}: this layout is one file. Give a path that ends in .safetensors.")
        tensors = with_alpha(tensors, None, str(path))
        return self.spelling.write(tensors), METADATA | _network(tensors) if self.network else METADATA


def comfyui(_cfg: LoraFileConfig, _deps: Any) -> SingleFile:
    """Build the format; it needs nothing."""
    return SingleFile(Spelling(COMFYUI, {A: A, B: B, ALPHA: ALPHA}))


def kohya(_cfg: LoraFileConfig, _deps: Any) -> SingleFile:
    """Build the format; it needs nothing."""
    ends = {A: ".lora_down.weight", B: ".lora_up.weight", ALPHA: ALPHA}
    return SingleFile(Spelling(KOHYA, ends, to_kohya, from_kohya), network=True)


def _network(tensors: Tensors) -> dict[str, str]:
    """Return what the metadata states of a LoRA's rank and alpha; `Dynamic` where modules differ."""
    ranks = {shape.rank for shape in modules(tensors).values()}
    alphas = {plain(alpha) for alpha in alphas_of(tensors).values()}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }


def _network_alpha(metadata: Mapping[str, Any]) -> float | None:
    """Return the alpha that the metadata states for modules without a tensor of it."""
    try:
        return float(metadata.get("ss_network_alpha", ""))
    except ValueError:
        return None
