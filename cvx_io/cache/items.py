"""Items of a feature cache: named by a digest of their ingredients, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from cvx_core.errors import CvxError, FormatError
from cvx_io.atomic import atomic_file
from cvx_io.tensors.header import read_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kind = Literal["latent", "image_latent", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Ingredients = Mapping[str, Any]
"""What an item is made of, as plain values under flat names such as "video.frames"."""

_TENSORS = {"latent": ("mean", "std"), "image_latent": ("mean", "std"), "text": ("embeds", "mask")}
_REMEDY = "Remove the file and run precompute again, or run `cvx cache verify --remove`."


class Moments(NamedTuple):
    """A posterior's mean and standard deviation, unscaled, each (C,T,h,w)."""

    mean: Tensor
    std: Tensor


class Text(NamedTuple):
    """A caption's embeddings (L,D), and its mask (L,) bool, True where a token is real."""

    embeds: Tensor
    mask: Tensor


class Encoded(NamedTuple):
    """What is known of one row without an encoder: moments of its video and image, and its text."""

    video: Moments | None = None
    image: Moments | None = None
    text: Text | None = None


def key_of(ingredients: Ingredients) -> str:
    """Return the name of the item that is made of these: 64 hex digits."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def path_of(folder: Path, kind: str, key: str) -> Path:
    """Return where an item lies."""
    return folder / kind / key[:2] / f"{key}.safetensors"


def write_item(folder: Path, kind: Kind, ingredients: Ingredients, tensors: Sequence[Tensor]) -> Path:
    """Write an item atomically; returns its file.

    Raises FormatError for values that are not finite, CvxError where the disk does not take it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    named = {name: t.detach().cpu().contiguous() for name, t in zip(_TENSORS[kind], tensors, strict=True)}
    for name, tensor in named.items():
        if not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise FormatError(
                f"{kind}: {bad} of {tensor.numel()} values of {name} are not finite. Use a wider dtype, "
                "such as bfloat16 for float16, or look at the clip."
            )
    path = path_of(folder, kind, key_of(ingredients))
    facts = {
        "format": "pt",
        "ingredients": json.dumps(ingredients, sort_keys=True),
        "digest": _digest(named.values()),
    }
    try:
        with atomic_file(path) as partial:
            save_file(named, partial, facts)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CvxError(
            f"{path}: cannot be written: {reason}. All other items are kept; make room, and run it again."
        ) from error
    return path


def read_item(path: Path, kind: str) -> tuple[Tensor, Tensor]:
    """Return the two tensors of an item, in one read. Raises FormatError where it is missing or damaged.

    Its digest is not compared; `check_item` does.
    """
    try:
        content, count = _read(path)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}. Run precompute again.") from error
    first, second = _TENSORS[kind]
    try:
        if count != len(content) or count < 8:
            raise ValueError(f"{count} of {len(content)} bytes were read")
        start = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(str(content[8:start], "utf-8"))
        return _view(content, start, entries[first]), _view(content, start, entries[second])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise FormatError(f"{path}: is no {kind} item of a cache: {error}. {_REMEDY}") from error


def check_item(path: Path, kind: str) -> Ingredients:
    """Return an item's ingredients after comparing its name, tensors and digest. Raises FormatError."""
    header = read_header(path)
    try:
        ingredients: Ingredients = json.loads(header.metadata["ingredients"])
        digest = header.metadata["digest"]
    except (KeyError, ValueError) as error:
        raise FormatError(f"{path}: is no item of a cache: no {error}. {_REMEDY}") from error
    if key_of(ingredients) != path.stem:
        raise FormatError(f"{path}: its name is not that of its ingredients. {_REMEDY}")
    if _digest(read_item(path, kind)) != digest:
        raise FormatError(f"{path}: its tensors are not those that were written. {_REMEDY}")
    return ingredients


def items_in(folder: Path) -> Iterator[tuple[Kind, Path]]:
    """Yield the kind and file of every item."""
    for kind in KINDS:
        for path in sorted((folder / kind).glob("??/*.safetensors")):
            if not path.name.startswith("."):
                yield kind, path


def _digest(tensors: Any) -> str:
    import torch

    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path) -> tuple[memoryview, int]:
    """Return room for a file, and how many bytes of it could be read there at once."""
    import torch

    file = os.open(path, os.O_RDONLY)
    try:
        room = torch.empty(os.fstat(file).st_size, dtype=torch.uint8).numpy().data  # bytes would be set to 0
        return room, os.readv(file, [room])
    finally:
        os.close(file)


def _view(content: memoryview, start: int, entry: Mapping[str, Any]) -> Tensor:
    """Return the tensor of a header's entry, in the bytes of its file."""
    import torch

    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(content) - start:
        raise ValueError(f"tensor at bytes {begin} to {end} of {len(content) - start}")
    dtype, size = _dtypes()[entry["dtype"]]
    if (end - begin) % size:
        raise ValueError(f"{end - begin} bytes of {entry['dtype']}")
    if begin == end:
        return torch.empty(0, dtype=dtype).view(entry["shape"])
    flat = torch.frombuffer(content, dtype=dtype, count=(end - begin) // size, offset=start + begin)
    if (start + begin) % size:
        flat = flat.clone()  # a copy is aligned
    return flat.view(entry["shape"])


@cache
def _dtypes() -> dict[str, tuple[torch.dtype, int]]:
    """Return what may be in an item: each with the bytes of a value."""
    import torch

    codes = {"BOOL": "bool", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
    dtypes = {code: getattr(torch, name) for code, name in codes.items()}
    return {code: (dtype, dtype.itemsize) for code, dtype in dtypes.items()}
