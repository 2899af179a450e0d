"""Writing safetensors with one tensor in memory at a time: the header, made from shapes, comes first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvx_core.errors import FormatError
from cvx_core.interfaces import TensorInfo, Tensors
from cvx_io.regroup import describe
from cvx_io.tensors.dtypes import num_bytes, size_of
from cvx_io.tensors.header import make_header
from cvx_io.tensors.stored import run_of

if TYPE_CHECKING:
    from torch import Tensor

METADATA = {"format": "pt"}
"""What readers of the Hugging Face libraries insist on."""


def write_file(
    path: Path,
    tensors: Tensors,
    names: Iterable[str] | None = None,
    metadata: Mapping[str, str] = METADATA,
) -> None:
    """Write one .safetensors file of some tensors, all by default.

    Widest dtypes go first, so that every tensor lies aligned; otherwise the order is kept. Raises FormatError
    where a tensor is not what the index says.
    """
    chosen = list(tensors.index if names is None else names)
    order = sorted(chosen, key=lambda name: -size_of(tensors.index[name].dtype))
    with path.open("wb") as file:
        file.write(make_header({name: tensors.index[name] for name in order}, metadata))
        for name in order:
            for chunk in chunks(name, [tensors.load(name)], tensors.index[name]):
                file.write(chunk)


def write_shards(folder: Path, stem: str, tensors: Tensors, limit: int) -> list[Path]:
    """Write tensors into one file, or into shards of at most `limit` bytes with an index file.

    A tensor larger than the limit has a shard of its own. Returns the files, the index last.
    """
    shards: list[list[str]] = [[]]
    held = total = 0
    for name, info in tensors.index.items():
        size = num_bytes(info)
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held, total = held + size, total + size
    if len(shards) == 1:
        write_file(folder / f"{stem}.safetensors", tensors)
        return [folder / f"{stem}.safetensors"]
    weight_map: dict[str, str] = {}
    files = []
    for number, names in enumerate(shards):
        file = folder / f"{stem}-{number + 1:05}-of-{len(shards):05}.safetensors"
        write_file(file, tensors, names)
        weight_map |= dict.fromkeys(names, file.name)
        files.append(file)
    index = folder / f"{stem}.safetensors.index.json"
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    index.write_text(text + "\n", encoding="utf-8")
    return [*files, index]


def chunks(name: str, tensors: Sequence[Tensor], expected: TensorInfo) -> Iterator[Any]:
    """Yield the bytes of a tensor, given whole or as pieces along dim 0, as buffers to be used at once.

    Raises FormatError where it is not as expected.
    """
    import torch

    found = describe(tensors[0])
    if len(tensors) > 1:
        rows = sum(len(tensor) for tensor in tensors)
        found = TensorInfo((rows, *found.shape[1:]), found.dtype)
    if found != expected:
        raise FormatError(
            f"{name!r} is {found}, but its source announced {expected}. Was it changed meanwhile?"
        )
    for tensor in tensors:
        flat = tensor.detach().to("cpu")
        if (run := run_of(flat)) is not None:
            yield from run.chunks()
        else:
            yield flat.contiguous().reshape(-1).view(torch.uint8).numpy().data
