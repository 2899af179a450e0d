"""LoRA weights: merging them into a model, and comparing what two of them change. Torch only to compute.

Names, shapes and alphas are in lora_state.py, fused modules in lora_fuse.py; what others need is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from cvx_core.errors import FormatError
from cvx_core.interfaces import Tensors
from cvx_io.lora_fuse import fuse, unfuse
from cvx_io.lora_state import (
    ALPHA,
    A,
    B,
    Made,
    Shape,
    alphas_of,
    identical,
    is_lora,
    modules,
    origins_of,
    stating,
    with_alpha,
    without_alpha,
)
from cvx_io.regroup import at, listed, nearest
from cvx_io.tensors.dtypes import is_float

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ALPHA",
    "A",
    "B",
    "Shape",
    "alphas_of",
    "compare",
    "fuse",
    "is_lora",
    "merge",
    "modules",
    "stating",
    "unfuse",
    "with_alpha",
    "without_alpha",
]


def merge(base: Tensors, lora: Tensors, scale: float = 1.0, where: str = "") -> Tensors:
    """Return a model's tensors with W + scale * alpha / r * B A for every weight W that the LoRA changes.

    Computed when loaded, in float32 (float64 if W is), and rounded once to W's dtype; other tensors stay as
    they are. where: the LoRA's file, for messages. Raises FormatError where the LoRA lacks an alpha, or the
    model a weight of the right shape.
    """
    lora = with_alpha(lora, None, where)
    shapes, alphas = modules(lora), alphas_of(lora)
    _check_fit(base, shapes, where)

    def changed(module: str, shape: Shape) -> Callable[[], Tensor]:
        return lambda: _merged(base, lora, module, scale * alphas[module] / shape.rank)

    touched = {
        f"{module}.weight": Made(
            base.index[f"{module}.weight"],
            changed(module, shape),
            origins_of(base, f"{module}.weight") + origins_of(lora, module + A, module + B),
        )
        for module, shape in shapes.items()
    }
    origins = {**base.origins, **{name: item.sources for name, item in touched.items()}}

    def load(name: str) -> Tensor:
        return touched[name].load() if name in touched else base.load(name)

    return Tensors(base.index, load, {**lora.dropped, **base.dropped}, origins, base.facts)


def compare(ours: Tensors, source: Tensors, where: str = "") -> None:
    """Check in float64 that two LoRAs change every weight alike; a module without LoRA is not changed.

    Factors that are the same, or the same numbers otherwise arranged, leave room for float64 rounding only;
    factors that were scaled or cast, for 1e-6 or the rounding of the coarsest dtype, per element and relative
    to |B| |A|. Raises FormatError naming the modules and the largest differences.
    """
    ours, source = with_alpha(ours, None, where), with_alpha(source, None, where)
    left, right = _Deltas(ours), _Deltas(source)
    wrong = []
    for module in dict.fromkeys([*right.shapes, *left.shapes]):
        if problem := left.difference(right, module):
            wrong.append(f"{module!r} by up to {problem}")
    if wrong:
        more = f" and {len(wrong) - 3} more modules" if len(wrong) > 3 else ""
        raise FormatError(
            f"{at(where)}does not change weights as its source does: {', '.join(wrong[:3])}{more}. "
            "Do not use it; convert again, in a wider dtype if it was narrowed."
        )


class _Deltas:
    """The changes that a LoRA makes to weights, one at a time in float64."""

    def __init__(self, lora: Tensors):
        self.lora, self.shapes, self.alphas = lora, modules(lora), alphas_of(lora)

    def difference(self, source: _Deltas, module: str) -> str | None:
        """Return how far one weight's changes are apart, for a message; None within rounding."""
        import torch

        if module not in self.shapes or module not in source.shapes:
            own = self if module in self.shapes else source
            change = own._product(module).abs()
            return f"{float(change.max()):.3g}, changed by only one of them" if change.any() else None
        if self.shapes[module][1:] != source.shapes[module][1:]:
            return f"its size, {self.shapes[module]} for {source.shapes[module]}"
        if self._same(source, module):
            return None
        wanted = source._product(module)
        apart = (self._product(module) - wanted).abs()
        if torch.all(apart <= self._rounding(source, module) * source._product(module, absolute=True)):
            return None
        return f"{float(apart.max()):.3g} where the largest change is {float(wanted.abs().max()):.3g}"

    def _same(self, other: _Deltas, module: str) -> bool:
        return self.alphas[module] == other.alphas[module] and all(
            identical(self.lora.load(module + end), other.lora.load(module + end)) for end in (A, B)
        )

    def _product(self, module: str, absolute: bool = False) -> Tensor:
        """Return the change (out,in); absolute: of |A|, |B| and |alpha|, what rounding is relative to."""
        a, b = (self.lora.load(module + end).double() for end in (A, B))
        scale = self._scale(module)
        return abs(scale) * (b.abs() @ a.abs()) if absolute else scale * (b @ a)

    def _scale(self, module: str) -> float:
        return self.alphas[module] / self.shapes[module].rank

    def _rounding(self, source: _Deltas, module: str) -> float:
        """Return the relative difference that storing the factors explains."""
        import torch

        dtypes = self._dtypes(module)
        scales = self._scale(module), source._scale(module)
        if dtypes == source._dtypes(module) and math.isclose(*scales, rel_tol=1e-12):
            return 1e-12
        return max(1e-6, *(torch.finfo(getattr(torch, name)).eps for name in dtypes))

    def _dtypes(self, module: str) -> tuple[str, str]:
        return self.lora.index[module + A].dtype, self.lora.index[module + B].dtype


def _check_fit(base: Tensors, shapes: Mapping[str, Shape], where: str) -> None:
    missing = [f"{module}.weight" for module in shapes if f"{module}.weight" not in base.index]
    if missing:
        raise FormatError(
            f"{at(where)}the model has no weight for {len(missing)} of {len(shapes)} LoRA modules: "
            f"{listed(missing)}.{nearest(missing[0], base.index)} Is the LoRA for another model?"
        )
    for module, shape in shapes.items():
        info = base.index[f"{module}.weight"]
        if info.shape != (shape.outputs, shape.inputs) or not is_float(info.dtype):
            raise FormatError(
                f"{at(where)}'{module}.weight' is {info.dtype} {list(info.shape)}, but its LoRA changes "
                f"floats of shape {[shape.outputs, shape.inputs]}. Is the LoRA for another model?"
            )


def _merged(base: Tensors, lora: Tensors, module: str, factor: float) -> Tensor:
    import torch

    weight = base.load(f"{module}.weight")
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    a, b = (lora.load(module + end).to(wide) for end in (A, B))
    return (weight.to(wide) + factor * (b @ a)).to(weight.dtype)  # rounded thrice, as other mergers do
