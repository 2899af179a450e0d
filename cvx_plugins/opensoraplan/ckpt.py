"""The `ckpt` format: what training saves in one file, weights under `ema_state_dict`, `state_dict` or bare.

Source: PKU-YuanGroup/Open-Sora-Plan opensora/train/train_causalvae.py (keys).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cvx_core import FormatError
from cvx_core.interfaces import Tensors
from cvx_io.atomic import read_json
from cvx_io.rename import IDENTITY, Names
from cvx_io.tensors.pickles import as_tensors, load_pickle
from cvx_io.tensors.stored import Stored
from cvx_plugins.opensoraplan import CkptConfig

SUFFIX = ".ckpt"
AVERAGE, TRAINED = "ema_state_dict", "state_dict"
GENERATOR = "gen_model"
"""Where `state_dict` holds the model when it was trained against a discriminator."""
WRAPPER = "module."


class Ckpt:
    """The `ckpt` format."""

    def __init__(self, cfg: CkptConfig):
        self.weights = cfg.weights

    def accepts(self, path: Path) -> bool:
        """Tell whether `path` is a .ckpt file, or a folder with just one."""
        return len(_files(path)) == 1

    def open(self, path: Path, names: Names | None = None) -> Tensors:
        """Return a file's weights; the facts hold the config.json beside it, if there is one.

        Raises FormatError where the file is damaged or holds no weights of the kind asked for.
        """
        files = [path] if path.is_file() else _files(path)
        if len(files) != 1:
            raise FormatError(f"{path}: holds {len(files)} {SUFFIX} files. Give the path of one.")
        file = files[0]
        state, dropped = self._chosen(load_pickle(file), file)
        tensors = {name: value for name, value in state.items() if isinstance(value, Stored)}
        if not tensors:
            raise FormatError(f"{file}: holds no tensors in {AVERAGE}, {TRAINED} or bare. Check the path.")
        dropped |= dict.fromkeys(state.keys() - tensors.keys(), "no tensor")
        wrapper = WRAPPER if all(name.startswith(WRAPPER) for name in tensors) else ""
        stored = as_tensors({name.removeprefix(wrapper): value for name, value in tensors.items()})
        config = file.parent / "config.json"
        facts = {"config": read_json(config)} if config.is_file() else {}
        return (names or IDENTITY).read(replace(stored, dropped=dropped, facts=facts), str(file))

    def write(
        self,
        path: Path,
        tensors: Tensors,
        names: Names | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Refuse: only training writes such files."""
        raise FormatError(f"{path}: {SUFFIX} files are written by training. Convert to hf or megatron.")

    def _chosen(self, tree: Any, file: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
        """Return the weights to read, and {entry beside them: why it is left out}."""
        if not isinstance(tree, Mapping):
            raise FormatError(f"{file}: expected a mapping, got {type(tree).__name__}. Check the path.")
        held = [key for key in (AVERAGE, TRAINED) if isinstance(tree.get(key), Mapping) and tree[key]]
        if not held:
            return tree, {}
        chosen = held[0] if self.weights == "ema" else TRAINED
        if chosen not in held:
            raise FormatError(f"{file}: holds no {TRAINED}. Read its {AVERAGE}: --set-from weights=ema.")
        dropped = {str(key): "training state" for key in tree if key not in held}
        if TRAINED in held and chosen != TRAINED:
            dropped[TRAINED] = f"{chosen} was read; --set-from weights=model reads this"
        if AVERAGE in held and chosen != AVERAGE:
            dropped[AVERAGE] = f"{chosen} was read, as asked"
        state = tree[chosen]
        if isinstance(state.get(GENERATOR), Mapping):
            beside = [key for key in state if key != GENERATOR]
            dropped |= {f"{chosen}.{key}": "not the model, but trained with it" for key in beside}
            state = state[GENERATOR]
        return state, dropped


def ckpt_format(cfg: CkptConfig, _deps: Any) -> Ckpt:
    """Build the format; it needs nothing else."""
    return Ckpt(cfg)


def _files(path: Path) -> list[Path]:
    """Return the file, or a folder's files, that end as training's do."""
    if path.is_dir():
        return [file for file in sorted(path.glob(f"*{SUFFIX}")) if file.is_file()]
    return [path] if path.suffix == SUFFIX and path.is_file() else []
