"""Lazy reading of safetensors: places, shapes and dtypes from headers. No torch until a tensor is read."""

from __future__ import annotations

from pathlib import Path

from cvx_core.interfaces import Tensors
from cvx_io.tensors.header import read_header
from cvx_io.tensors.shards import check_shard, read_index, weights_file
from cvx_io.tensors.stored import Stored


def open_safetensors(path: Path) -> Tensors:
    """Return one state dict: a .safetensors file, shards with an index file, or a folder with either.

    The facts hold the files' metadata. Raises FormatError where files are missing, damaged or contradict each
    other.
    """
    file = weights_file(path)
    found: dict[str, Stored] = {}
    facts: dict[str, str] = {}
    shard_of = read_index(file) if file.suffix == ".json" else {}
    for shard in dict.fromkeys(shard_of.values()) if shard_of else [file]:
        header = read_header(shard)
        if shard_of:
            listed = (name for name, owner in shard_of.items() if owner == shard)
            check_shard(file, shard, listed, header.tensors)
        found |= dict(sorted(header.tensors.items(), key=lambda item: item[1].offset))
        facts |= header.metadata
    return Tensors(
        {name: stored.info for name, stored in found.items()}, lambda name: found[name].load(), facts=facts
    )
