"""Built-in formats: how weights lie on disk. Implementations import their libraries when built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from cvx_core import Component, Config, hookimpl
from cvx_core.config import InputPath, Positive
from cvx_core.registry import Registry
from cvx_plugins.formats import pipeline


class HFConfig(Config):
    """A folder with config.json and safetensors (whole or in shards), or one .safetensors file."""

    canonical: ClassVar[bool] = True  # names in the files are ours, unless a names table says otherwise

    path: InputPath | None = None
    """The folder, the index file of the shards, or the file. Needed to read."""
    shard_limit: Positive = 5_000_000_000
    """Most bytes of tensors in one file when a folder is written; also what writing holds in memory."""

    @classmethod
    def sections(cls, path: Path, registry: Registry) -> tuple[Mapping[str, Any], list[str]] | None:
        """Return the recipe sections and notes `model: path` stands for; None if it is no such folder.

        Raises FormatError on a part of the folder that no installed component recognises.
        """
        return pipeline.sections(path, registry)


class DCPConfig(Config):
    """A torch distributed checkpoint: a folder with .metadata and .distcp files, of FSDP or of a run here."""

    canonical: ClassVar[bool] = True  # names in the files are ours, unless a names table says otherwise

    path: InputPath | None = None
    """The folder of one step. Needed to read."""
    part: str | None = None
    """Read only names under this prefix, such as `model`, and strip it. Without it: `model` where the
    checkpoint holds a training state, else everything."""


@hookimpl
def cvx_components() -> Iterable[Component]:
    yield Component(
        "format",
        "hf",
        HFConfig,
        "cvx_plugins.formats.hf:hf_format",
        summary="Hugging Face folders: config.json with safetensors, canonical names",
    )
    yield Component(
        "format",
        "dcp",
        DCPConfig,
        "cvx_plugins.formats.dcp:dcp_format",
        summary="Torch distributed checkpoints: .metadata with .distcp files, canonical names",
    )
