"""SAT checkpoints: torch.save files with a transformer under `module`, or an autoencoder under `state_dict`.

Source: THUDM/CogVideo sat/, SwissArmyTransformer training/model_io.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cvx_core import FormatError
from cvx_core.interfaces import Tensors
from cvx_io.atomic import atomic_file, atomic_folder, read_word
from cvx_io.lora import alphas_of, modules, stating, without_alpha
from cvx_io.pieces import pieces
from cvx_io.regroup import listed
from cvx_io.rename import IDENTITY, Names
from cvx_io.tensors.archive import torch_archive
from cvx_io.tensors.pickles import as_tensors, load_pickle
from cvx_io.tensors.stored import Stored
from cvx_plugins.formats import SATConfig

LATEST = "latest"
WEIGHTS = "mp_rank_00_model_states.pt"
VAE = "3d-vae.pt"
ALPHA = "lora_alpha"
"""Where our own files state the alpha of their LoRA matrices; SAT has it in its config."""
ADAPTER = (".matrix_A.", ".matrix_B.")


class SAT:
    """The `sat` format."""

    def __init__(self, cfg: SATConfig):
        self.tag, self.adapter = cfg.tag, cfg.lora

    def accepts(self, path: Path) -> bool:
        """Tell whether `path` is a transformer's folder, one of its tags, or a file that SAT wrote."""
        if path.is_dir():
            if not any((path / name).is_file() for name in (LATEST, WEIGHTS, VAE)):
                return False
            try:
                return not _is_adapter(self.file(path))
            except FormatError:  # opening it says what is wrong
                return True
        return path.suffix in (".pt", ".pth") and path.is_file() and _is_adapter(path) is False

    def open(self, path: Path, names: Names | None = None) -> Tensors:
        """Return a checkpoint's weights; engine state beside them is left out.

        Raises FormatError on a file with LoRA matrices, unless the config says to drop them: read as plain
        weights it would be the untrained model.
        """
        file = self.file(path)
        source = read_state(file)
        matrices = [name for name in source.index if any(mark in name for mark in ADAPTER)]
        if matrices and self.adapter == "refuse":
            raise FormatError(
                f"{file}: carries LoRA weights, {len(matrices)} matrices, first {matrices[0]!r}. Convert "
                "them with --to diffusers-lora, merge them with --merge-lora, or leave them out with "
                "--set-from lora=drop."
            )
        index = {name: info for name, info in source.index.items() if name not in set(matrices)}
        dropped = {**source.dropped, **dict.fromkeys(matrices, "LoRA, left out as asked")}
        return (names or IDENTITY).read(replace(source, index=index, dropped=dropped), str(file))

    def write(
        self,
        path: Path,
        tensors: Tensors,
        names: Names | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a transformer's folder, its `latest` last, or one file where `path` ends in .pt.

        Names without a prefix are an autoencoder's, which is one file in any case.
        """
        table = names or IDENTITY
        foreign = table.write(tensors, str(path))
        key = "module" if table.prefix else "state_dict"
        if path.suffix == ".pt":
            with atomic_file(path) as partial:
                write_state(partial, foreign, key)
            return
        if key == "state_dict":
            with atomic_folder(path, manifest=VAE) as partial:
                write_state(partial / VAE, foreign, key)
            return
        tag = self.tag or "1"
        with atomic_folder(path, manifest=LATEST, stale=(f"{tag}/{WEIGHTS}",)) as partial:
            (partial / tag).mkdir()
            write_state(partial / tag / WEIGHTS, foreign, key)
            (partial / LATEST).write_text(tag, encoding="utf-8")

    def file(self, path: Path) -> Path:
        """Return the file to read. Raises FormatError where there is none, or a model-parallel one."""
        if path.is_file():
            return path
        folder = path
        if (path / LATEST).is_file() or self.tag is not None:
            tag = self.tag or read_word(path / LATEST)
            if Path(tag).name != tag or tag in ("", ".."):
                raise FormatError(f"{path / LATEST}: holds {tag!r}; expected the name of a folder beside it.")
            folder = path / tag
            if not folder.is_dir():
                said = "no such folder" if self.tag else f"no such folder, but {LATEST} names it"
                raise FormatError(f"{folder}: {said}. Copy it again, or choose a save: --set-from tag=NAME.")
        elif (path / VAE).is_file():
            return path / VAE
        ranks = sorted(file.name for file in folder.glob("mp_rank_*_model_states.pt"))
        if not ranks:
            raise FormatError(f"{folder}: holds no {WEIGHTS}. Is the download complete?")
        if ranks != [WEIGHTS]:
            raise FormatError(
                f"{folder}: holds {listed(ranks)}; model-parallel SAT checkpoints cannot be read. "
                "Merge them with SAT first."
            )
        return folder / WEIGHTS


def sat_format(cfg: SATConfig, _deps: Any) -> SAT:
    """Build the format; it needs nothing else."""
    return SAT(cfg)


def read_state(file: Path) -> Tensors:
    """Return every tensor of a file under its own name; the facts hold what our own files add."""
    tree = load_pickle(file)
    key = _weights_key(tree)
    if key is None:
        raise FormatError(
            f"{file}: has neither 'module' nor 'state_dict', as SAT's files do. Check the path."
        )
    state = {str(name): value for name, value in tree[key].items() if isinstance(value, Stored)}
    odd = {str(name): "no tensor" for name in tree[key] if str(name) not in state}
    engine = {str(name): "state of the training engine" for name in tree if name not in (key, ALPHA)}
    facts = {name: tree[name] for name in (ALPHA,) if name in tree}
    return replace(as_tensors(state), dropped={**odd, **engine}, facts=facts)


def write_state(
    path: Path, foreign: Tensors, key: str, extra: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Write one file with tensors under `key`."""
    with torch_archive(path, foreign.index, lambda state: {key: state, **extra}) as archive:
        for name in foreign.index:
            archive.write(name, pieces(foreign, name))


def _weights_key(tree: Any) -> str | None:
    if not isinstance(tree, Mapping):
        return None
    return next((key for key in ("module", "state_dict") if isinstance(tree.get(key), Mapping)), None)


def _is_adapter(path: Path) -> bool | None:
    """Tell whether a file holds LoRA matrices and nothing else; None where SAT did not write it."""
    try:
        tree = load_pickle(path)
    except FormatError:
        return None
    key = _weights_key(tree)
    if key is None:
        return None
    return bool(tree[key]) and all(any(mark in str(name) for mark in ADAPTER) for name in tree[key])


class SATLora(SAT):
    """The `sat-lora` format: the LoRA matrices of a checkpoint, whatever else is in it."""

    def accepts(self, path: Path) -> bool:
        """Tell whether `path` holds LoRA matrices alone; with base weights beside them it is `sat`."""
        try:
            return bool(_is_adapter(self.file(path)))
        except (FormatError, OSError):
            return False

    def open(self, path: Path, names: Names | None = None) -> Tensors:
        """Return the matrices, with alphas where the file states them; SAT's own do not."""
        file = self.file(path)
        found = (names or IDENTITY).read(read_state(file), str(file))
        alpha = found.facts.get(ALPHA)
        return found if alpha is None else stating(found, dict.fromkeys(modules(found), alpha), str(file))

    def write(
        self,
        path: Path,
        tensors: Tensors,
        names: Names | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the matrices alone. Raises FormatError where ranks or alphas differ: SAT has one of each."""
        foreign, extra = self._plan(path, tensors, names)
        if path.suffix == ".pt":
            with atomic_file(path) as partial:
                write_state(partial, foreign, "module", extra)
            return
        tag = self.tag or "1"
        with atomic_folder(path, manifest=LATEST, stale=(f"{tag}/{WEIGHTS}",)) as partial:
            (partial / tag).mkdir()
            write_state(partial / tag / WEIGHTS, foreign, "module", extra)
            (partial / LATEST).write_text(tag, encoding="utf-8")

    def check(self, path: Path, tensors: Tensors, names: Names | None = None) -> None:
        """Raise FormatError where `write` would, before anything is written."""
        self._plan(path, tensors, names)

    def _plan(self, path: Path, tensors: Tensors, names: Names | None) -> tuple[Tensors, dict[str, Any]]:
        """Return the matrices under the names in the file, and what is stated of them all."""
        alphas, ranks = alphas_of(tensors), {shape.rank for shape in modules(tensors).values()}
        if len(ranks) != 1 or len(set(alphas.values())) != 1:
            raise FormatError(
                f"{path}: ranks {sorted(ranks)} and alphas {sorted(set(alphas.values()))}; SAT has one "
                "of each for all layers. Merge the LoRA into its base with --merge-lora instead."
            )
        foreign = (names or IDENTITY).write(without_alpha(tensors), str(path))
        return foreign, {ALPHA: next(iter(alphas.values()))}


def sat_lora_format(cfg: SATConfig, _deps: Any) -> SATLora:
    """Build the format; it needs nothing else."""
    return SATLora(cfg)
