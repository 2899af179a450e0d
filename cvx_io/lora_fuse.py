"""Between LoRAs of separate modules, such as q, k and v, and LoRAs of one fused module."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from cvx_core.errors import FormatError
from cvx_core.interfaces import TensorInfo, Tensors
from cvx_io.lora_state import (
    ALPHA,
    SCALAR,
    A,
    B,
    Made,
    Shape,
    alphas_of,
    assembled,
    identical,
    modules,
    scalar,
    single,
    with_alpha,
)

if TYPE_CHECKING:
    from torch import Tensor


def unfuse(tensors: Tensors, fused: Mapping[str, Sequence[str]]) -> Tensors:
    """Return LoRAs of separate modules for those of fused ones, whose rows are the parts' one after another.

    fused: {template of a module: those of its parts}, {i} standing for a number. Each part has A and alpha of
    the whole, and its own rows of B. Raises FormatError where rows cannot be split evenly, or a part is there
    already.
    """
    shapes = modules(tensors)
    made: dict[str, Made | None] = {}
    for module, shape in shapes.items():
        parts = _parts_of(module, fused)
        for part in parts or ():
            if part in shapes:
                raise FormatError(f"both {module!r} and its part {part!r} have a LoRA. Remove one of them.")
        if parts is None:
            made |= {module + end: None for end in (A, B, ALPHA) if module + end in tensors.index}
        elif shape.outputs % len(parts):
            raise FormatError(
                f"{module + B!r} has {shape.outputs} rows, but consists of {len(parts)} equal parts. "
                "Wrong model or format?"
            )
        else:
            for position, part in enumerate(parts):
                made |= _part(tensors, module, part, shape, position, len(parts))
    return assembled(tensors, made)


def fuse(tensors: Tensors, fused: Mapping[str, Sequence[str]]) -> Tensors:
    """Return LoRAs of fused modules for those of their parts; the reverse of `unfuse`.

    Parts whose A are equal share it. Otherwise the ranks add up: A holds theirs one after another, B is
    block-diagonal, and alpha grows with the rank, so that alpha / r stays. Only where alpha / r differs from
    part to part is B scaled, to alpha = r, and rounded. A part without LoRA counts as zero. Reads every A of
    a part. Raises FormatError where alphas are missing, or parts differ in size or dtype.
    """
    tensors = with_alpha(tensors, None)
    shapes, alphas = modules(tensors), alphas_of(tensors)
    made: dict[str, Made | None] = {}
    for module in shapes:
        whole = _whole_of(module, fused)
        if whole is None:
            made |= {module + end: None for end in (A, B, ALPHA)}
        elif whole[0] in shapes:
            raise FormatError(f"both {whole[0]!r} and its part {module!r} have a LoRA. Remove one of them.")
        elif whole[0] + A not in made:
            made |= _Group(tensors, shapes, alphas, *whole).made()
    return assembled(tensors, made)


class _Group:
    """The LoRAs of the parts of one fused module, on their way to one."""

    def __init__(
        self,
        tensors: Tensors,
        shapes: Mapping[str, Shape],
        alphas: Mapping[str, float],
        whole: str,
        parts: Sequence[str],
    ):
        self.tensors, self.whole, self.parts = tensors, whole, parts
        self.shapes = {part: shapes[part] for part in parts if part in shapes}
        self._check()
        self.shared = self._is_shared()
        ranks = [shape.rank for shape in self.shapes.values()]
        self.rank = ranks[0] if self.shared else sum(ranks)
        scales = {part: Fraction(alphas[part]) / shape.rank for part, shape in self.shapes.items()}
        common = scales[next(iter(scales))] if len(set(scales.values())) == 1 else None
        self.alpha = float(self.rank) if common is None else single(float(common * self.rank))
        self.factors = {} if common is not None else {part: float(scale) for part, scale in scales.items()}

    def made(self) -> dict[str, Made]:
        """Return the three tensors of the fused module."""
        shape = next(iter(self.shapes.values()))
        sources = {end: [part + end for part in self.shapes] for end in (A, B, ALPHA)}
        rows = shape.outputs * len(self.parts)
        return {
            self.whole + A: Made(TensorInfo((self.rank, shape.inputs), self._dtype(A)), self._a, sources[A]),
            self.whole + B: Made(TensorInfo((rows, self.rank), self._dtype(B)), self._b, sources[B]),
            self.whole + ALPHA: Made(SCALAR, lambda: scalar(self.alpha), sources[ALPHA]),
        }

    def _a(self) -> Tensor:
        import torch

        parts = list(self.shapes)[:1] if self.shared else self.shapes
        return torch.cat([self.tensors.load(part + A) for part in parts])

    def _b(self) -> Tensor:
        import torch

        rows, column = next(iter(self.shapes.values())).outputs, 0
        joined = torch.zeros(rows * len(self.parts), self.rank, dtype=getattr(torch, self._dtype(B)))
        for position, part in enumerate(self.parts):
            if part not in self.shapes:
                continue
            piece, rank = self.tensors.load(part + B), self.shapes[part].rank
            if part in self.factors:
                piece = (piece.double() * self.factors[part]).to(piece.dtype)
            joined[position * rows : (position + 1) * rows, column : column + rank] = piece
            column += 0 if self.shared else rank
        return joined

    def _dtype(self, end: str) -> str:
        return self.tensors.index[next(iter(self.shapes)) + end].dtype

    def _check(self) -> None:
        sizes = {(shape.inputs, shape.outputs) for shape in self.shapes.values()}
        dtypes = {tuple(self.tensors.index[part + end].dtype for end in (A, B)) for part in self.shapes}
        if len(sizes) > 1 or len(dtypes) > 1:
            said = ", ".join(
                f"{part} {shape.outputs}x{shape.inputs} {self.tensors.index[part + A].dtype}"
                for part, shape in self.shapes.items()
            )
            raise FormatError(f"parts of {self.whole!r} differ in size or dtype: {said}. Export them again.")

    def _is_shared(self) -> bool:
        first, *others = self.shapes
        return all(
            self.shapes[part].rank == self.shapes[first].rank
            and identical(self.tensors.load(first + A), self.tensors.load(part + A))
            for part in others
        )


def _part(
    tensors: Tensors, whole: str, part: str, shape: Shape, position: int, count: int
) -> dict[str, Made]:
    rows = shape.outputs // count
    b = TensorInfo((rows, shape.rank), tensors.index[whole + B].dtype)
    made = {
        part + A: Made(tensors.index[whole + A], lambda: tensors.load(whole + A), [whole + A]),
        part + B: Made(b, lambda: tensors.load(whole + B).tensor_split(count)[position], [whole + B]),
    }
    if whole + ALPHA in tensors.index:
        info = tensors.index[whole + ALPHA]
        made[part + ALPHA] = Made(info, lambda: tensors.load(whole + ALPHA), [whole + ALPHA])
    return made


def _parts_of(module: str, fused: Mapping[str, Sequence[str]]) -> list[str] | None:
    """Return the parts of a fused module; None for any other."""
    for whole, parts in fused.items():
        if match := _pattern(whole).fullmatch(module):
            return [part.format_map(match.groupdict()) for part in parts]
    return None


def _whole_of(module: str, fused: Mapping[str, Sequence[str]]) -> tuple[str, list[str]] | None:
    """Return the fused module that a part belongs to, and all its parts; None for any other module."""
    for whole, parts in fused.items():
        for template in parts:
            if match := _pattern(template).fullmatch(module):
                fields = match.groupdict()
                return whole.format_map(fields), [part.format_map(fields) for part in parts]
    return None


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(template)))
