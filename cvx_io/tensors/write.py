"""Writing safetensors with one tensor in memory at a time: the header, made from shapes, comes first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cvx_core.interfaces import TensorInfo, Tensors
from cvx_io.pieces import checked, pieces
from cvx_io.tensors.behind import BUFFER_SIZE, Buffer, write_behind
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
    with write_behind(path) as file:
        file.write(make_header({name: tensors.index[name] for name in order}, metadata))
        for name in order:
            for chunk in chunks(name, pieces(tensors, name), tensors.index[name], file.buffer):
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


def chunks(name: str, found: Iterable[Tensor], expected: TensorInfo, buffer: Buffer) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, given by its pieces, in the buffers that `buffer` gives.

    Raises FormatError where it is not as expected.
    """
    for piece in checked(name, found, expected):
        flat = piece.detach().to("cpu")
        run = run_of(flat)
        yield from run.chunks(buffer) if run is not None else _copied(flat, buffer)


def _copied(piece: Tensor, buffer: Buffer) -> Iterator[memoryview]:
    """Copy a tensor in memory of any layout, as many rows at a time as fit."""
    import torch

    row = piece[:1].nbytes if piece.ndim else 0
    if piece.is_contiguous() or row > BUFFER_SIZE:
        piece, row = piece.reshape(-1), piece.element_size()
    if not piece.numel():
        return
    for block in piece.split(max(1, BUFFER_SIZE // row)):
        room = buffer()[: block.nbytes]
        torch.frombuffer(room, dtype=block.dtype).view(block.shape).copy_(block)
        yield room
