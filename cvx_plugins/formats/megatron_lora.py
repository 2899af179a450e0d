"""LoRA checkpoints of MindSpeed-MM: a Megatron tree with the adapters of fused layers and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvx_core import FormatError
from cvx_core.interfaces import Tensors
from cvx_io.lora import alphas_of, fuse, is_lora, modules, stating, unfuse, without_alpha
from cvx_io.rename import IDENTITY, Names
from cvx_plugins.formats import MegatronConfig
from cvx_plugins.formats.megatron import LORA, Megatron, names_in


class MegatronLora:
    """The `megatron-lora` format. MindSpeed-MM has alpha and rank on its command line, and in `args`."""

    def __init__(self, cfg: MegatronConfig):
        self.cfg = cfg

    def accepts(self, path: Path) -> bool:
        """Tell whether `path` is a checkpoint of LoRA weights alone."""
        return is_lora(names_in(path))

    def open(self, path: Path, names: Names | None = None) -> Tensors:
        """Return the adapters of separate layers, with alphas where the training's arguments state them.

        MindSpeed-MM changes every layer by lora_alpha / lora_r, whatever the rank of its matrices.
        """
        table = names or IDENTITY
        found = Megatron(self.cfg).open(path, table)
        args = found.facts.get("args", {})
        if "lora_alpha" in args:
            shapes = modules(found, str(path))
            rank = int(args.get("lora_r") or max(shape.rank for shape in shapes.values()))
            scale = float(args["lora_alpha"]) / rank
            alphas = {module: scale * shape.rank for module, shape in shapes.items()}
            found = stating(found, alphas, str(path))
        return unfuse(found, table.fused)

    def write(
        self,
        path: Path,
        tensors: Tensors,
        names: Names | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a tree. Raises FormatError where alpha / rank differs; MindSpeed-MM has one for all."""
        held, stated = self._plan(path, tensors, names)
        Megatron(self.cfg, {LORA: stated}).write(path, held, names)

    def check(self, path: Path, tensors: Tensors, names: Names | None = None) -> None:
        """Raise FormatError where `write` would, before anything is written."""
        held, _ = self._plan(path, tensors, names)
        Megatron(self.cfg).check(path, held, names)

    def _plan(self, path: Path, tensors: Tensors, names: Names | None) -> tuple[Tensors, dict[str, float]]:
        """Return the matrices, and what is stated of them all."""
        fused = fuse(tensors, (names or IDENTITY).fused)
        shapes, alphas = modules(fused), alphas_of(fused)
        scales = sorted({alphas[module] / shape.rank for module, shape in shapes.items()})
        if len(scales) != 1:
            raise FormatError(
                f"{path}: alpha / rank is {', '.join(f'{scale:g}' for scale in scales)} in different layers; "
                "MindSpeed-MM has one for all. Merge the LoRA into its base with --merge-lora instead."
            )
        rank = max(shape.rank for shape in shapes.values())
        return without_alpha(fused), {"lora_r": rank, "lora_alpha": scales[0] * rank}


def megatron_lora_format(cfg: MegatronConfig, _deps: Any) -> MegatronLora:
    """Build the format; it needs nothing else."""
    return MegatronLora(cfg)
