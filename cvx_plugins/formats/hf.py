"""Hugging Face model folders: config.json beside safetensors, whole or sharded. Reads .bin files too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvx_core import FormatError
from cvx_core.interfaces import Piece, TensorInfo
from cvx_io.atomic import atomic_file, atomic_folder, write_json
from cvx_io.rename import IDENTITY, Names, Renaming
from cvx_io.tensors.pickles import PickleReader
from cvx_io.tensors.safetensors import SafetensorsReader
from cvx_io.tensors.shards import has_weights, weights_file
from cvx_io.tensors.write import write_file, write_shards
from cvx_plugins.formats import HFConfig
from cvx_plugins.formats.pipeline import FOLDER_OF, INDEX, TOKENIZER, index_of

if TYPE_CHECKING:
    from torch import Tensor

STALE = ("*.safetensors", "*.safetensors.index.json", "*pytorch_model*.bin", "*pytorch_model*.bin.index.json")
"""What an earlier export leaves in a folder that is written again."""


class HF:
    """The `hf` format. Names are canonical unless a table says otherwise."""

    def __init__(self, cfg: HFConfig):
        self.shard_limit = cfg.shard_limit

    def accepts(self, path: Path) -> bool:
        """Tell from file names whether `path` is a model's folder, a shard index or a weight file."""
        if path.is_dir():
            return (path / "config.json").is_file() and has_weights(path)
        return path.name.endswith((".safetensors", ".safetensors.index.json")) and path.is_file()

    def index(self, path: Path, names: Names | None = None) -> dict[str, TensorInfo]:
        """Return shape and dtype of every canonical tensor. Raises FormatError on damaged files."""
        reader = _reader(path)
        stored = reader.index()
        return _plan(stored, path, names).index(stored)

    def read(
        self, path: Path, names: Names | None = None, only: Sequence[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield canonical tensors one at a time, on the CPU, all of them or `only` those named."""
        reader = _reader(path)
        plan = _plan(reader.index(), path, names)
        if only is not None:
            plan = plan.only(only, str(path))
        yield from plan.apply(reader.read(plan.sources))

    def write(
        self,
        path: Path,
        tensors: Iterable[tuple[str, Tensor]],
        names: Names | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a folder with `config` as its config.json, or one file where `path` ends in .safetensors.

        The folder appears complete or not at all, replaces an earlier export there, and needs one shard of
        memory; a single file needs all of its tensors in memory and keeps no config.
        """
        foreign = (names or IDENTITY).reverse(tensors)
        if path.suffix == ".safetensors":
            with atomic_file(path) as partial:
                write_file(partial, dict(foreign))
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


def _reader(path: Path) -> SafetensorsReader | PickleReader:
    file = weights_file(path)
    is_safetensors = file.name.endswith((".safetensors", ".safetensors.index.json"))
    return SafetensorsReader(file) if is_safetensors else PickleReader(file)


def _plan(stored: Iterable[str], path: Path, names: Names | None) -> Renaming:
    return (names or IDENTITY).plan(stored, str(path))


def _stem(config: Mapping[str, Any]) -> str:
    """Return the file stem its library looks for; transformers states architectures or model_type."""
    is_transformers = "architectures" in config or "model_type" in config
    return "model" if is_transformers else "diffusion_pytorch_model"
