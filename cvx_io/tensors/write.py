"""Writing safetensors with one tensor in memory at a time: the header, made from shapes, comes first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cvx_core.interfaces import TensorInfo, Tensors
from cvx_io.pieces import checked, pieces
from cvx_io.tensors.behind import BLOCK_SIZE, Room, write_behind
from cvx_io.tensors.dtypes import num_bytes, size_of
from cvx_io.tensors.header import make_header
from cvx_io.tensors.stored import Reader, run_of

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
    with write_behind(path) as file, Reader() as reader:
        file.write(make_header({name: tensors.index[name] for name in order}, metadata))
        for name in order:
            file.writelines(chunks(name, pieces(tensors, name), tensors.index[name], file.room, reader))


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


def chunks(
    name: str, found: Iterable[Tensor], expected: TensorInfo, room: Room, reader: Reader
) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, given by its pieces; what is read from a file lies in the room given.

    Use each chunk before the next. Raises FormatError where the tensor is not as expected.
    """
    import torch

    for piece in checked(name, found, expected):
        flat = piece.detach().to("cpu")
        if (run := run_of(flat)) is not None:
            yield from reader.chunks(run, room)
            continue
        for block in _blocks(flat):
            yield block.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _blocks(piece: Tensor) -> Sequence[Tensor]:
    """Return the rows of a tensor, a few at a time where it does not lie in one run of memory."""
    if piece.is_contiguous():
        return [piece]
    return piece.split(max(1, BLOCK_SIZE // max(1, piece[:1].nbytes)))
