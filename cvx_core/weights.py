"""Putting a file's tensors into a module's parameters: all or none, checked before any data is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cvx_core.errors import FormatError
from cvx_core.interfaces import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 10
"""How many names of each kind an error lists."""


@dataclass(frozen=True)
class Coverage:
    """How a file covers a module. consumed: {name: parameter}; dropped: {name: why it is not needed}."""

    consumed: Mapping[str, str]
    dropped: Mapping[str, str] = field(default_factory=dict)


def check_index(
    index: Mapping[str, TensorInfo],
    wanted: Mapping[str, tuple[int, ...]],
    path: Path | str,
    aliases: Mapping[str, str | None] | None = None,
) -> Coverage:
    """Compare what a file holds with the parameters {name: shape} a module wants; reads no tensor.

    aliases: other names a file may use: {alias: parameter}, or {alias: None} for a tensor the module does not
    need. An alias is used where the parameter's own name is absent, and dropped otherwise. Raises FormatError
    listing everything missing, extra and misshaped at once.
    """
    aliases = aliases or {}
    consumed = {name: name for name in index if name in wanted}
    dropped: dict[str, str] = {}
    extra: list[str] = []
    for name in index:
        if name in consumed:
            continue
        target = aliases.get(name)
        if target in wanted and target not in consumed.values():
            consumed[name] = str(target)
        elif name in aliases:
            dropped[name] = "the model computes it" if target is None else f"{target} is there too"
        else:
            extra.append(name)
    missing = [name for name in wanted if name not in consumed.values()]
    misshaped = [
        f"{name} is {list(index[name].shape)}, expected {list(wanted[target])}"
        for name, target in consumed.items()
        if tuple(index[name].shape) != tuple(wanted[target])
    ]
    if missing or extra or misshaped:
        lists = (
            ("missing", [f"{name} {list(wanted[name])}" for name in missing]),
            ("not expected", [f"{name} {list(index[name].shape)}" for name in extra]),
            ("of another shape", misshaped),
        )
        found = f"{len(index)} tensors found, {len(wanted)} expected"
        raise FormatError(
            f"{path}: does not fit: {found}.{_listing(lists)}\n  {_remedy(consumed, misshaped)}"
        )
    return Coverage(consumed, dropped)


def copy_into(
    params: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], consumed: Mapping[str, str]
) -> dict[tuple[str, str], int]:
    """Copy tensors into parameters one at a time; `consumed` is the Coverage's. Keeps each parameter's dtype.

    Returns {(dtype in the file, dtype of the parameter): count} of the tensors that were cast. Raises
    FormatError where the stream ends before every parameter was filled.
    """
    import torch

    casts: Counter[tuple[str, str]] = Counter()
    waiting = set(consumed.values())
    with torch.no_grad():
        for name, tensor in tensors:
            param = params[consumed[name]]
            if tensor.dtype != param.dtype:
                casts[_dtype(tensor), _dtype(param)] += 1
            copy_part(param, tensor)
            waiting.discard(consumed[name])
    if waiting:
        raise FormatError(
            f"{len(waiting)} tensors never came, first {min(waiting)!r}. Was the file changed meanwhile?"
        )
    return dict(casts)


def copy_part(param: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a parameter; into a DTensor only the part that this rank holds."""
    if not hasattr(param, "placements"):  # asked so, for importing DTensor takes a while
        param.copy_(whole)
        return
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(param, DTensor)
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    if 0 not in shape:
        part = whole[tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))]
        param.to_local().copy_(part)


def _listing(lists: Iterable[tuple[str, list[str]]]) -> str:
    text = ""
    for what, items in lists:
        if items:
            more = f"\n    and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
            text += f"\n  {len(items)} {what}:" + "".join(f"\n    {item}" for item in items[:SHOWN]) + more
    return text


def _remedy(consumed: Mapping[str, str], misshaped: list[str]) -> str:
    if not consumed:
        return "No name matches: another model, or another format. Check `weights.use` and `weights.path`."
    if misshaped:
        return "The sizes differ: use the preset of these weights, or set its fields to these shapes."
    return "The names differ: use the preset of these weights (layers, variant), or a complete file."


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
