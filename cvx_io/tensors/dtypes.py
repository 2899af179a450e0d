"""Names and sizes of tensor dtypes, as torch spells them. No torch."""

from __future__ import annotations

import math

from cvx_core.errors import FormatError
from cvx_core.interfaces import TensorInfo

SIZES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
}

STORAGES = {
    "bool": "BoolStorage",
    "uint8": "ByteStorage",
    "int8": "CharStorage",
    "int16": "ShortStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int32": "IntStorage",
    "float32": "FloatStorage",
    "int64": "LongStorage",
    "float64": "DoubleStorage",
    "complex64": "ComplexFloatStorage",
}
"""The storage classes by which pickles of torch.save state a dtype; other dtypes are stated apart."""


def size_of(dtype: str) -> int:
    """Return the bytes of one element. Raises FormatError for a dtype that is not among SIZES."""
    if dtype not in SIZES:
        raise FormatError(f"cannot store dtype {dtype!r}. Convert the tensor to one of: {', '.join(SIZES)}.")
    return SIZES[dtype]


def num_bytes(info: TensorInfo) -> int:
    """Return the bytes of a tensor. Raises FormatError as size_of does."""
    return math.prod(info.shape) * size_of(info.dtype)


def is_float(dtype: str) -> bool:
    """Tell whether a dtype is one that weights are cast between."""
    return dtype in ("float16", "bfloat16", "float32", "float64")
