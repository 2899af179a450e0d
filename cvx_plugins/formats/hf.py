"""Hugging Face model folders: config.json beside safetensors, whole or sharded. Reads .bin files too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cvx_core import FormatError
from cvx_core.interfaces import Piece, Tensors
from cvx_io.atomic import atomic_file, atomic_folder, read_json, write_json
from cvx_io.lora import is_lora
from cvx_io.rename import IDENTITY, Names
from cvx_io.tensors.header import read_header
from cvx_io.tensors.pickles import open_pickle
from cvx_io.tensors.safetensors import open_safetensors
from cvx_io.tensors.shards import has_weights, weights_file
from cvx_io.tensors.write import write_file, write_shards
from cvx_plugins.formats import HFConfig
from cvx_plugins.formats.pipeline import FOLDER_OF, INDEX, TOKENIZER, index_of

SUFFIXES = (".safetensors", ".safetensors.index.json")
STALE = ("*.safetensors", "*.safetensors.index.json", "*pytorch_model*.bin", "*pytorch_model*.bin.index.json")
"""What an earlier export leaves in a folder that is written again."""


class HF:
    """The `hf` format. Names are canonical unless a table says otherwise."""

    def __init__(self, cfg: HFConfig):
        self.shard_limit = cfg.shard_limit

    def accepts(self, path: Path) -> bool:
        """Tell whether `path` is a model's folder, a shard index or a weight file, and no LoRA."""
        if path.is_dir():
            return (path / "config.json").is_file() and has_weights(path)
        if not path.is_file() or not path.name.endswith(SUFFIXES):
            return False
        return path.suffix == ".json" or not is_lora(_names_in(path))

    def open(self, path: Path, names: Names | None = None) -> Tensors:
        """Return what is at `path`; the facts are the folder's config.json and the files' own metadata.

        Raises FormatError on files that are missing, damaged or contradict each other.
        """
        file = weights_file(path)
        stored = open_safetensors(file) if file.name.endswith(SUFFIXES) else open_pickle(file)
        found = (names or IDENTITY).read(stored, str(path))
        config = file.parent / "config.json"
        facts = {**stored.facts, "config": read_json(config)} if config.is_file() else stored.facts
        return replace(found, facts=facts)

    def write(
        self,
        path: Path,
        tensors: Tensors,
        names: Names | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a folder with `config` as its config.json, or one file where `path` ends in .safetensors.

        Either appears complete or not at all. A folder replaces an earlier export there; a file keeps no
        config.
        """
        foreign = (names or IDENTITY).write(tensors, str(path))
        if path.suffix == ".safetensors":
            with atomic_file(path) as partial:
                write_file(partial, foreign)
            return
        if config is None:
            raise FormatError(
                f"{path}: a folder needs a config.json. Give the config, or a path to a .safetensors."
            )
        with atomic_folder(path, manifest="config.json", stale=STALE) as partial:
            write_shards(partial, _stem(config), foreign, self.shard_limit)
            text = json.dumps(dict(config), indent=2, sort_keys=True)
            (partial / "config.json").write_text(text + "\n", encoding="utf-8")

    def write_model(self, path: Path, pieces: Mapping[str, Piece]) -> None:
        """Write a pipeline folder: a sub-folder per part, the tokenizer, and model_index.json last."""
        for section, piece in pieces.items():
            folder = path / FOLDER_OF[section]
            if piece.tensors is None:
                write_json(folder / f"{FOLDER_OF[section]}_config.json", dict(piece.config))
            else:
                self.write(folder, piece.tensors, None, piece.config)
            if piece.tokenizer is not None:
                shutil.copytree(piece.tokenizer, path / TOKENIZER, dirs_exist_ok=True)
        write_json(path / INDEX, index_of(pieces))


def hf_format(cfg: HFConfig, _deps: Any) -> HF:
    """Build the format; it needs nothing else."""
    return HF(cfg)


def _names_in(path: Path) -> list[str]:
    """Return the names in a safetensors file; none where its header cannot be read."""
    try:
        return list(read_header(path).tensors)
    except FormatError:
        return []


def _stem(config: Mapping[str, Any]) -> str:
    """Return the file stem its library looks for; transformers states architectures or model_type."""
    is_transformers = "architectures" in config or "model_type" in config
    return "model" if is_transformers else "diffusion_pytorch_model"
