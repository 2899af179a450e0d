"""Fields of AdamW, with state in full and in 8 bits. Free of torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from cvx_core.errors import Problem
from cvx_plugins.optimizers.shared_config import Beta, OptimizerConfig

if TYPE_CHECKING:
    from cvx_core.spec import Spec

SHORTEST = 64
"""Values in a row of a parameter, at least, for its state to be kept in 8 bits."""
BLOCKS = (256, 128, 64)


class AdamConfig(OptimizerConfig):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the running mean and of the running square of a gradient."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the denominator."""


class AdamWConfig(AdamConfig):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    fused: Literal["auto"] | bool = "auto"
    """One kernel for all parameters; `auto` uses it on cuda and cpu, where it is fastest."""


class AdamW8bitConfig(AdamConfig):
    """AdamW whose two states take one byte each: a level of 256 times a scale (Dettmers et al. 2021)."""

    block: Literal[64, 128, 256] = 256
    """Values of one row that share a scale. Rows shorter than 64 values keep their state in full."""

    def limits(self, spec: Spec) -> Mapping[str, Container[int]]:
        """Return the ranks along tp that cut rows between blocks."""
        widths = _row_widths(spec)
        plan = spec.config("predictor").plan() if widths else None
        return {"tp": _ranks(widths, self.block, plan.num_heads)} if plan is not None else {}

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield that ranks of tp would have parts of blocks."""
        yield from super().check(spec)
        ranks = next((c.config.size for c in spec.parallel if c.name == "tp"), 1)
        widths = _row_widths(spec)
        for width in widths:
            for part in parts(width, ranks):
                if ranks > 1 and not fits(part, self.block):
                    yield Problem(
                        "block", f"{self._cut(width, part, ranks)} {self._remedy(widths, spec, ranks)}"
                    )
                    return

    def _cut(self, width: int, part: int, ranks: int) -> str:
        return (
            f"{self.block} does not divide the {part} values of each row of {width} that one of {ranks} "
            "ranks of tp holds."
        )

    def _remedy(self, widths: Sequence[int], spec: Spec, ranks: int) -> str:
        blocks = [size for size in BLOCKS if all(fits(p, size) for w in widths for p in parts(w, ranks))]
        if blocks:
            return f"Use block: {blocks[0]}."
        sizes = _ranks(widths, self.block, spec.config("predictor").plan().num_heads)[1:]
        text = f"tp.size {' or '.join(map(str, sizes))}, or " if sizes else ""
        return f"No block does. Use {text}adamw."


def fits(length: int, block: int) -> bool:
    """Tell whether a part of a row is made of whole blocks, or too short to have any."""
    return length < SHORTEST or not length % block


def parts(width: int, ranks: int) -> list[int]:
    """Return what each of the ranks of tp holds of a row: as much as the first, while there is some."""
    most = -(-width // ranks)
    return [max(0, min(most, width - most * rank)) for rank in range(ranks)]


def _ranks(widths: Sequence[int], block: int, most: int) -> list[int]:
    """Return the numbers of ranks that cut no block."""
    return [
        n for n in range(1, most + 1) if all(fits(p, block) for w in widths for p in parts(w, n)) or n == 1
    ]


def _row_widths(spec: Spec) -> tuple[int, ...]:
    """Return the lengths of the rows that tp cuts, where all of them are trained and the plan states them."""
    trains = getattr(spec.config("task"), "trains", None)
    plan = getattr(spec.config("predictor"), "plan", None)
    if trains != "predictor" or plan is None or "adapter" in spec.choices:
        return ()
    return tuple(plan().row_widths)
