"""The header of a safetensors file, read, checked and made without torch.

A file is an 8-byte little-endian header length, that many bytes of JSON, then the tensors without gaps.
Source: huggingface/safetensors README.md, section Format.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cvx_core.errors import FormatError
from cvx_core.interfaces import TensorInfo
from cvx_io.tensors.dtypes import num_bytes
from cvx_io.tensors.stored import Stored

HEADER_LIMIT = 100_000_000
"""Longest legal header in bytes, a limit of the format."""

_CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
}
_DTYPES = {code: name for name, code in _CODES.items()}


class Header(NamedTuple):
    """What the header of a file tells: where each tensor lies, and the file's own metadata."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Return where every tensor lies, its shape and dtype. Raises FormatError on any damage or gap."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or not 2 <= length <= min(size - 8, HEADER_LIMIT):
            said = "no header" if length is None else f"a header of {length} bytes announced"
            raise FormatError(
                f"{path}: not a safetensors file, or cut short: {said} in {size} bytes. "
                "Download or export it again."
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        entries = {name: _entry(value) for name, value in header.items() if name != "__metadata__"}
        metadata = dict(header.get("__metadata__") or {})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"{path}: broken safetensors header: {error}. Download or export the file again."
        ) from error
    _check_offsets(path, entries, size - 8 - length)
    stored = {name: Stored(path, 8 + length + begin, info) for name, (info, begin, _) in entries.items()}
    return Header(stored, {str(key): str(value) for key, value in metadata.items()})


def make_header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Return the header, length included, of a file whose tensors follow in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, info in infos.items():
        begin, end = end, end + num_bytes(info)
        header[name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name is given twice")
    return found


def _entry(value: Mapping[str, Any]) -> tuple[TensorInfo, int, int]:
    if value["dtype"] not in _DTYPES:
        raise ValueError(f"unknown dtype {value['dtype']!r}")
    shape, (begin, end) = tuple(value["shape"]), value["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"shape {value['shape']} or offsets {value['data_offsets']} are not counts")
    return TensorInfo(shape, _DTYPES[value["dtype"]]), begin, end


def _check_offsets(path: Path, entries: Mapping[str, tuple[TensorInfo, int, int]], available: int) -> None:
    position = 0
    for name, (info, begin, end) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if begin != position or end - begin != num_bytes(info):
            raise FormatError(
                f"{path}: {name!r} ({info.dtype} {list(info.shape)}, {num_bytes(info)} bytes) is said to "
                f"lie at bytes {begin} to {end}, where byte {position} is next. Download or export it again."
            )
        position = end
    if position != available:
        raise FormatError(
            f"{path}: the header announces {position} bytes of tensors, the file holds {available}. "
            f"It was {'cut short' if available < position else 'extended'}; download or export it again."
        )
