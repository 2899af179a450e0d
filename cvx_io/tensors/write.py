"""Writing safetensors from a stream of tensors, one shard in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cvx_core.errors import FormatError
from cvx_io.regroup import describe
from cvx_io.tensors.header import make_header, num_bytes

if TYPE_CHECKING:
    from torch import Tensor

METADATA = {"format": "pt"}
"""What readers of the Hugging Face libraries insist on."""


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = METADATA) -> None:
    """Write one .safetensors file. Widest dtypes go first, so that every tensor lies aligned."""
    import torch

    infos = {name: describe(tensor) for name, tensor in tensors.items()}
    order = sorted(infos, key=lambda name: (-tensors[name].element_size(), name))
    with path.open("wb") as file:
        file.write(make_header({name: infos[name] for name in order}, metadata))
        for name in order:
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def write_shards(folder: Path, stem: str, tensors: Iterable[tuple[str, Tensor]], limit: int) -> list[Path]:
    """Write `{stem}.safetensors`, or shards of at most `limit` bytes of tensors and their index file.

    Holds at most `limit` bytes of tensors and the one being added; a larger tensor is a shard of its own. The
    folder should not be seen until this returns. Raises FormatError on a name given twice.
    """
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    seen: set[str] = set()
    held_bytes = total = 0
    for name, tensor in tensors:
        if name in seen:
            raise FormatError(f"{folder}: tensor {name!r} is given twice. Each name is stored once.")
        size = num_bytes(describe(tensor))
        if held and held_bytes + size > limit:
            shards.append(_flush(folder, len(shards), held))
            held_bytes = 0
        seen.add(name)
        held[name] = _own(tensor)
        held_bytes, total = held_bytes + size, total + size
    if held or not shards:
        shards.append(_flush(folder, len(shards), held))
    return _name_shards(folder, stem, shards, total)


def _own(tensor: Tensor) -> Tensor:
    """Bring a tensor to the CPU; a view of something larger is copied, so that the rest is not kept alive."""
    tensor = tensor.detach().to("cpu").contiguous()
    used = tensor.numel() * tensor.element_size()
    return tensor.clone() if tensor.untyped_storage().nbytes() > used else tensor


def _flush(folder: Path, number: int, held: dict[str, Tensor]) -> list[str]:
    write_file(folder / f"{number}.shard", held)
    names = list(held)
    held.clear()
    return names


def _name_shards(folder: Path, stem: str, shards: list[list[str]], total: int) -> list[Path]:
    """Give the shards their final names, which tell how many there are, and write the index last."""
    if len(shards) == 1:
        return [(folder / "0.shard").rename(folder / f"{stem}.safetensors")]
    files: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = folder / f"{stem}-{number + 1:05}-of-{len(shards):05}.safetensors"
        files.append((folder / f"{number}.shard").rename(file))
        weight_map |= dict.fromkeys(names, file.name)
    index = folder / f"{stem}.safetensors.index.json"
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    index.write_text(text + "\n", encoding="utf-8")
    return [*files, index]
