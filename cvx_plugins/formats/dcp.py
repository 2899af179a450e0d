"""Distributed checkpoints of torch, such as FSDP and our own training runs save: the weights in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cvx_core import FormatError
from cvx_core.interfaces import Tensors
from cvx_io.atomic import atomic_folder, read_json
from cvx_io.rename import IDENTITY, Names
from cvx_io.tensors.dcp import SUFFIX, part_of, write_dcp
from cvx_io.tensors.dcp_metadata import METADATA, Checkpoint, read_checkpoint
from cvx_plugins.formats import DCPConfig

CONFIG = "config.json"
MODEL, OPTIMIZER = "model", ("optimizer.", "optim.")
"""How the entries of a training state start."""


class DCP:
    """The `dcp` format. Names are canonical unless a table says otherwise."""

    def __init__(self, cfg: DCPConfig):
        self.part = cfg.part

    def accepts(self, path: Path) -> bool:
        """Tell whether `path` is a folder with .metadata and .distcp files."""
        return (path / METADATA).is_file() and any(path.glob(f"*{SUFFIX}"))

    def open(self, path: Path, names: Names | None = None) -> Tensors:
        """Return the weights at `path`; the facts hold the folder's config.json, if it has one.

        Raises FormatError on files that are missing or damaged, and on a folder of several checkpoints.
        """
        _refuse_run(path)
        checkpoint = read_checkpoint(path)
        part = _usual_part(checkpoint) if self.part is None else self.part
        stored = part_of(checkpoint, part)
        found = (names or IDENTITY).read(stored, str(path))
        origins = {
            name: [own for source in found.origins[name] for own in stored.origins.get(source, (source,))]
            for name in found.index
        }
        facts = {"config": read_json(path / CONFIG)} if (path / CONFIG).is_file() else {}
        return replace(found, origins=origins, facts=facts)

    def write(
        self,
        path: Path,
        tensors: Tensors,
        names: Names | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a folder that torch loads by itself, with `config`, if there is one, as its config.json.

        The folder appears complete or not at all, and replaces an earlier checkpoint there.
        """
        foreign = (names or IDENTITY).write(tensors, str(path))
        with atomic_folder(path, manifest=METADATA, stale=(f"*{SUFFIX}", CONFIG)) as partial:
            write_dcp(partial, foreign)
            if config is not None:
                text = json.dumps(dict(config), indent=2, sort_keys=True)
                (partial / CONFIG).write_text(text + "\n", encoding="utf-8")


def dcp_format(cfg: DCPConfig, _deps: Any) -> DCP:
    """Build the format; it needs nothing else."""
    return DCP(cfg)


def _usual_part(checkpoint: Checkpoint) -> str:
    """Return what the names of the weights start with: `model` beside an optimizer's state, else nothing."""
    names = [*checkpoint.tensors, *checkpoint.objects]
    is_training_state = any(name.startswith(OPTIMIZER) for name in names)
    return MODEL if is_training_state and any(name.startswith(f"{MODEL}.") for name in names) else ""


def _refuse_run(path: Path) -> None:
    """Raise FormatError where `path` is not a checkpoint but holds some, as the folder of a run does."""
    if (path / METADATA).is_file():
        return
    if inside := sorted([*path.glob(f"*/{METADATA}"), *path.glob(f"checkpoints/*/{METADATA}")]):
        raise FormatError(
            f"{path}: holds {len(inside)} checkpoints. Give the path of one, such as {inside[-1].parent}."
        )
