"""Reading pickles without running anything that they name.

Containers and numbers come out as they are, tensors by reference. Every other class or function that a pickle
asks for is replaced by an inert stand-in that keeps what it was given. Nothing is imported for a pickle, and
nothing that it names is called. No torch.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from cvx_core.errors import FormatError
from cvx_core.interfaces import TensorInfo
from cvx_io.tensors.dtypes import SIZES, STORAGES


class Inert:
    """Stands for an object of a foreign class. name: what the pickle called it; args, state: what it gave."""

    name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **_kwargs: Any) -> Inert:
        self = super().__new__(cls)
        self.args = args
        self.state = None
        return self

    def __init__(self, *_args: Any, **_kwargs: Any):
        """Take anything."""

    def __call__(self, *args: Any, **_kwargs: Any) -> Inert:
        return Inert(*args)

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            self.__dict__.update({str(key): value for key, value in state.items()})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__.setdefault("items", {})[str(key)] = value

    def append(self, value: Any) -> None:
        """Keep an item of a foreign list."""
        self.__dict__.setdefault("values", []).append(value)

    def extend(self, values: Any) -> None:
        """Keep items of a foreign list."""
        self.__dict__.setdefault("values", []).extend(values)

    def __repr__(self) -> str:
        return f"<{self.name or 'foreign object'}, not loaded>"


class Storage:
    """A storage that a pickle refers to: the key of its file, its dtype (None: bytes) and elements."""

    def __init__(self, key: str, dtype: str | None, count: int):
        self.key, self.dtype, self.count = key, dtype, count


class TensorRef:
    """A tensor that a pickle refers to: part of a storage. offset, stride: in elements."""

    def __init__(self, storage: Storage, offset: int, info: TensorInfo, stride: tuple[int, ...]):
        self.storage, self.offset, self.info, self.stride = storage, offset, info, stride


class _DType(str):
    """A dtype or a typed storage class; the value is the dtype's name, "" for raw bytes."""


def load(data: bytes, where: str, allowed: Mapping[tuple[str, str], Any] | None = None) -> Any:
    """Return what a pickle holds. Raises FormatError where it is damaged.

    allowed: {(module, name): what to use for it} besides the built-in list.
    """
    try:
        _check_memo(data)
        return _Unpickler(io.BytesIO(data), allowed or {}).load()
    except FormatError:
        raise
    except Exception as error:  # damage surfaces as any of a dozen types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{where}: damaged pickle: {reason}. Download or save it again.") from error


def _check_memo(data: bytes) -> None:
    """Raise ValueError on a place in the memo that no pickle of this length uses: all up to it get memory."""
    at = 0
    while at < len(data):
        code = data[at]
        at += 1
        if code == _STOP:
            return
        if code not in _ARGUMENTS:
            raise ValueError(f"at byte {at - 1}, opcode {chr(code)!r} unknown")
        end = _end_of_argument(data, at, _ARGUMENTS[code])
        if code in (_PUT, _LONG_BINPUT):
            place = int(data[at:end]) if code == _PUT else int.from_bytes(data[at:end], "little")
            if place > len(data):
                raise ValueError(f"place {place} in the memo of a pickle of {len(data)} bytes")
        at = end
    raise ValueError("the pickle ends too early")


def _end_of_argument(data: bytes, at: int, size: int) -> int:
    """Return where an argument that begins at a byte ends. size: as _ARGUMENTS has it."""
    if size >= 0:
        return at + size
    if size in _LINES:
        for _ in range(_LINES[size]):
            at = data.index(b"\n", at) + 1
        return at
    width, signed = _COUNTED[size]
    length = int.from_bytes(data[at : at + width], "little", signed=signed)
    if length < 0:
        raise ValueError(f"an argument of {length} bytes")
    return at + width + length


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, allowed: Mapping[tuple[str, str], Any]):
        super().__init__(file, encoding="utf-8")
        self._known = {**_KNOWN, **allowed}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._known:
            return self._known[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _DType(_STORAGES[name])
        if module == "torch" and name in SIZES:
            return _DType(name)
        return type(name, (Inert,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _location, count = pid
        if kind != "storage" or not isinstance(dtype, _DType):
            raise ValueError(f"refers to an unknown kind of storage, {kind!r} of {dtype!r}")
        return Storage(str(key), str(dtype) or None, int(count))


def _tensor(storage: Storage, offset: int, size: Any, stride: Any, *rest: Any) -> TensorRef:
    """Stand in for torch._utils._rebuild_tensor_v2, and v3, which states the dtype apart."""
    stated = next((value for value in rest if isinstance(value, _DType)), None)
    dtype = str(stated) if stated is not None else storage.dtype
    if not isinstance(storage, Storage) or dtype is None:
        raise ValueError("a tensor without storage or dtype")
    shape, steps = tuple(map(int, size)), tuple(map(int, stride))
    if len(shape) != len(steps) or min((*shape, *steps, int(offset)), default=0) < 0:
        raise ValueError(f"a tensor of shape {shape} with strides {steps}")
    return TensorRef(storage, int(offset), TensorInfo(shape, dtype), steps)


def _parameter(data: Any, *_rest: Any) -> Any:
    return data


def _subclass(make: Callable[..., Any], _type: Any, args: Any, _state: Any) -> Any:
    """Stand in for torch._tensor._rebuild_from_type_v2; `make` is one of ours or inert."""
    return make(*args)


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "list"): list,
    ("builtins", "dict"): dict,
    ("builtins", "tuple"): tuple,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _subclass,
}
_TWO_LINES = -99
_ARGUMENTS: Mapping[int, int] = {
    ord(opcode.code): 0
    if opcode.arg is None
    else _TWO_LINES
    if opcode.arg.name == "stringnl_noescape_pair"
    else opcode.arg.n
    for opcode in pickletools.opcodes
}
"""The bytes that follow an opcode; below zero, how they tell how many they are."""
_LINES = {pickletools.UP_TO_NEWLINE: 1, _TWO_LINES: 2}
_COUNTED = {
    pickletools.TAKEN_FROM_ARGUMENT1: (1, False),
    pickletools.TAKEN_FROM_ARGUMENT4: (4, True),
    pickletools.TAKEN_FROM_ARGUMENT4U: (4, False),
    pickletools.TAKEN_FROM_ARGUMENT8U: (8, False),
}
"""(bytes, sign) of the number that comes first and says how many follow."""
_PUT, _LONG_BINPUT, _STOP = pickle.PUT[0], pickle.LONG_BINPUT[0], pickle.STOP[0]
_STORAGES = {kind: dtype for dtype, kind in STORAGES.items()} | {"UntypedStorage": ""}
