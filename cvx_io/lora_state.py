"""LoRA tensors under canonical names: what they are called, what shapes they have, and their alphas.

Canonical names are `<module>.lora_A.weight` (r,in), `<module>.lora_B.weight` (out,r) and, where the source
states it, `<module>.alpha`, a float32 scalar; the change of a module's weight is alpha / r * B A. No torch
until a tensor is made.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from cvx_core.errors import FormatError
from cvx_core.interfaces import TensorInfo, Tensors
from cvx_io.regroup import at, listed
from cvx_io.tensors.dtypes import is_float

if TYPE_CHECKING:
    from torch import Tensor

A, B, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
"""What follows the module in canonical names."""
MARKS = (".lora_A.", ".lora_B.", ".lora_up.", ".lora_down.", ".lora.up.", ".lora.down.")
BESIDE = (".alpha", ".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
"""What LoRA files hold beside the factors, variants that cannot be converted included."""
SCALAR = TensorInfo((), "float32")

_NAME = re.compile(r"(.+)(\.lora_A\.weight|\.lora_B\.weight|\.alpha)", re.DOTALL)


class Shape(NamedTuple):
    """The shapes of one module's factors: A (rank,inputs), B (outputs,rank)."""

    rank: int
    inputs: int
    outputs: int


class Made(NamedTuple):
    """A tensor that is made when it is loaded, from the source tensors named."""

    info: TensorInfo
    load: Callable[[], Tensor]
    sources: Sequence[str]


def is_lora(names: Iterable[str]) -> bool:
    """Tell from the names in a file whether it holds LoRA weights and nothing else."""
    found = [name for name in names if not name.endswith(BESIDE)]
    return bool(found) and all(any(mark in name for mark in MARKS) for name in found)


def modules(tensors: Tensors, where: str = "") -> dict[str, Shape]:
    """Return the modules that canonical LoRA tensors change, in their order.

    Raises FormatError on other tensors, on A without B or the reverse, and on shapes that do not fit.
    """
    found: dict[str, set[str]] = {}
    strange = [name for name in tensors.index if not _NAME.fullmatch(name)]
    for name in tensors.index:
        if match := _NAME.fullmatch(name):
            found.setdefault(match[1], set()).add(match[2])
    if strange:
        raise FormatError(
            f"{at(where)}{len(strange)} tensors are no plain LoRA factors: {listed(strange)}. "
            "Only lora_A, lora_B and alpha can be used; export without biases, DoRA and whole modules."
        )
    if not found:
        raise FormatError(f"{at(where)}holds no LoRA tensors. Check the path.")
    lone = {module: parts for module, parts in found.items() if not parts >= {A, B}}
    if lone:
        absent = [module + part for module, parts in lone.items() for part in (A, B) if part not in parts]
        raise FormatError(f"{at(where)}lacks {len(absent)} factors: {listed(absent)}. Is it complete?")
    return {module: _shape(tensors, module, ALPHA in parts, where) for module, parts in found.items()}


def alphas_of(tensors: Tensors) -> dict[str, float]:
    """Return {module: alpha} of the modules that state one, in single precision."""
    return {
        name.removesuffix(ALPHA): single(float(tensors.load(name)))
        for name in tensors.index
        if name.endswith(ALPHA)
    }


def stating(tensors: Tensors, alphas: Mapping[str, float], where: str = "") -> Tensors:
    """Return the tensors with the alphas given, {module: alpha}, beside those they state, as float32 scalars.

    Raises FormatError as `modules` does, on two alphas for one module, and on one that is not finite.
    """
    shapes, stated = modules(tensors, where), alphas_of(tensors)
    given = {module: single(alpha) for module, alpha in alphas.items()}
    for module in given.keys() & stated.keys():
        if given[module] != stated[module]:
            raise FormatError(
                f"{at(where)}{module!r} has alpha {stated[module]:g} in the file, but {given[module]:g} was "
                "given or is in its config. Only one of them can be right; remove the other."
            )
    final = stated | given
    if wrong := [module for module, alpha in final.items() if not math.isfinite(alpha)]:
        raise FormatError(
            f"{at(where)}alpha of {listed(wrong)} is not a finite number. Train or export again."
        )

    made: dict[str, Made | None] = {name: None for name in tensors.index if not name.endswith(ALPHA)}
    for module in (module for module in shapes if module in final):
        sources = [module + ALPHA] if module in stated else []
        made[module + ALPHA] = Made(SCALAR, partial(scalar, final[module]), sources)
    return assembled(tensors, made)


def with_alpha(tensors: Tensors, alpha: float | None, where: str = "") -> Tensors:
    """Return the tensors with an alpha for every module: the one stated, else the one given.

    Raises FormatError as `stating` does, and where an alpha is neither stated nor given: there is no default.
    """
    shapes = modules(tensors, where)
    found = stating(tensors, {} if alpha is None else dict.fromkeys(shapes, alpha), where)
    if absent := [module for module in shapes if module + ALPHA not in found.index]:
        raise FormatError(
            f"{at(where)}states no alpha for {len(absent)} modules: {listed(absent)}. Their change is "
            "alpha / rank * B A, so pass --alpha. SAT scales by alpha / r with lora_alpha of its training "
            "config; diffusers and PEFT take alpha for lora_alpha, and the rank where it is not stated."
        )
    return found


def without_alpha(tensors: Tensors) -> Tensors:
    """Return the matrices alone, for files that have no place for an alpha."""
    index = {name: info for name, info in tensors.index.items() if not name.endswith(ALPHA)}
    return replace(tensors, index=index)


def assembled(tensors: Tensors, made: Mapping[str, Made | None]) -> Tensors:
    """Return the tensors of `made`; None stands for the tensor that has the name already."""
    index = {name: tensors.index[name] if item is None else item.info for name, item in made.items()}

    def load(name: str) -> Tensor:
        item = made[name]
        return tensors.load(name) if item is None else item.load()

    sources = {name: [name] if item is None else item.sources for name, item in made.items()}
    origins = {name: origins_of(tensors, *own) for name, own in sources.items()}
    different = {name: own for name, own in origins.items() if own != [name]}
    return Tensors(index, load, tensors.dropped, different, tensors.facts)


def origins_of(tensors: Tensors, *names: str) -> list[str]:
    """Return the names in the file that some tensors are made of."""
    return [origin for name in names for origin in tensors.origins.get(name, [name])]


def identical(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are the same bit for bit."""
    import torch

    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left, right = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(left, right)


def scalar(value: float) -> Tensor:
    import torch

    return torch.tensor(value, dtype=torch.float32)


def single(value: float) -> float:
    """Return a number rounded to single precision, infinite where that cannot hold it."""
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def _shape(tensors: Tensors, module: str, has_alpha: bool, where: str) -> Shape:
    a, b = tensors.index[module + A], tensors.index[module + B]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in a.shape + b.shape:
        raise FormatError(
            f"{at(where)}{module!r}: A {list(a.shape)} and B {list(b.shape)} are not (r,in) and (out,r). "
            "Only LoRAs of linear layers can be used."
        )
    if not (is_float(a.dtype) and is_float(b.dtype)):
        raise FormatError(
            f"{at(where)}{module!r}: A is {a.dtype} and B {b.dtype}. Export unquantised factors."
        )
    if has_alpha and math.prod(tensors.index[module + ALPHA].shape) != 1:
        alpha = tensors.index[module + ALPHA]
        raise FormatError(
            f"{at(where)}{module + ALPHA!r} has shape {list(alpha.shape)}; one number is needed."
        )
    return Shape(a.shape[0], a.shape[1], b.shape[0])
