"""Which files hold a model's tensors: one file, or shards named by an index file. No torch.

An index file is JSON: {"metadata": {...}, "weight_map": {tensor name: file name beside the index}}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from cvx_core.errors import FormatError

KINDS = (
    ("*.safetensors.index.json", "*.safetensors"),
    ("*pytorch_model*.bin.index.json", "*pytorch_model*.bin"),
)
"""(pattern of index files, pattern of weight files), the preferred kind first."""


_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


def has_weights(folder: Path) -> bool:
    """Tell, from file names alone, whether a folder holds weights."""
    return any(next(folder.glob(pattern), None) for kind in KINDS for pattern in kind)


def weights_file(path: Path) -> Path:
    """Return the file to open: `path` itself, or a folder's only index or weight file.

    Raises FormatError where there is none, or where more than one could be meant.
    """
    if path.is_file():
        return path
    for index_pattern, pattern in KINDS:
        indices, files = sorted(path.glob(index_pattern)), sorted(path.glob(pattern))
        shards = set(read_index(indices[0]).values()) if indices else set()
        candidates = indices + [file for file in files if file not in shards]
        if len(candidates) > 1 and not indices and all(_SHARD.search(file.name) for file in candidates):
            raise FormatError(
                f"{path}: holds {len(candidates)} shards such as {candidates[0].name}, but no "
                f"{index_pattern}, which lists them. Download it too."
            )
        if len(candidates) > 1:
            listed = ", ".join(file.name for file in candidates)
            raise FormatError(
                f"{path}: holds more than one set of weights: {listed}. Give the path of one of them."
            )
        if candidates:
            return candidates[0]
    what = "no .safetensors or pytorch_model.bin file in it" if path.is_dir() else "no such file or folder"
    raise FormatError(f"{path}: {what}. Check the path, and that the download is complete.")


def read_index(path: Path) -> dict[str, Path]:
    """Return {tensor name: shard} of an index file; every shard exists. Raises FormatError otherwise."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name) for name in weight_map.values()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FormatError(
            f"{path}: not an index of shards ({error!r}). Download or export it again."
        ) from error
    for name in sorted(names):
        if Path(name).name != name:
            raise FormatError(
                f"{path}: shard {name!r} is not a plain file name. Shards lie beside their index."
            )
    if missing := sorted(name for name in names if not (path.parent / name).is_file()):
        raise FormatError(
            f"{path}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing[:5])}. "
            f"Put them into {path.parent}."
        )
    return {tensor: path.parent / str(name) for tensor, name in weight_map.items()}


def check_shard(index: Path, shard: Path, listed: Iterable[str], stored: Mapping[str, object]) -> None:
    """Compare what an index lists for a shard with what it stores. Raises FormatError on a difference."""
    listed = set(listed)
    absent, strange = sorted(listed - stored.keys()), sorted(stored.keys() - listed)
    for names, what in (
        (absent, "are listed but not stored"),
        (strange, "are stored but not listed"),
    ):
        if names:
            raise FormatError(
                f"{index}: disagrees with {shard.name}: {len(names)} tensors {what}, first {names[0]!r}. "
                "Index and shards are of different exports; get all files from one."
            )
