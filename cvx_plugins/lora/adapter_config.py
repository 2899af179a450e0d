"""Configs of the two adapters: the LoRA that is trained, and those that are loaded. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, field_validator

from cvx_core import Config
from cvx_core.config import NonNegative, Positive
from cvx_core.errors import CvxError, Problem
from cvx_core.interfaces import Deps

if TYPE_CHECKING:
    from cvx_core.spec import Spec

Alpha = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
SPLITTING = {"tp": "layers", "ring": "tokens", "ulysses": "tokens", "pp": "blocks"}
"""What the ranks of an axis have a part of: they would draw other dropout masks than one process."""


class Where(NamedTuple):
    """Which layers: patterns of the ends of their names; name and places of the blocks that hold them, None:
    anywhere.
    """

    patterns: tuple[str, ...]
    blocks: str = ""
    chosen: tuple[int, ...] | None = None


class LoraConfig(Config):
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W + alpha / rank * B A, with W frozen."""

    rank: Positive = 128
    """Columns of B and rows of A."""
    alpha: Alpha = 64.0
    """The change of a weight is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability that an input of A is dropped in training; drawn anew for every step and data rank."""
    targets: tuple[str, ...] | None = None
    """Linear layers, by the last components of their names, in each of which * stands for anything; null:
    those that the predictor names.
    """
    blocks: tuple[NonNegative | str, ...] | None = None
    """Transformer blocks whose layers are targets, by number from 0 and ranges such as "10-19"; null: all
    blocks, and what lies outside them.
    """
    init: Literal["uniform", "gaussian"] = "uniform"
    """What A starts as: uniform in +-1/sqrt(inputs), or Gaussian of deviation 1/rank. B starts as zero."""

    @field_validator("targets", "blocks")
    @classmethod
    def _some(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not value:
            raise ValueError("is an empty list, so nothing would be trained; leave it out.")
        return value

    @field_validator("blocks")
    @classmethod
    def _ranges(cls, value: tuple[int | str, ...] | None) -> tuple[int | str, ...] | None:
        for item in value or ():
            if isinstance(item, str) and (
                not (match := re.fullmatch(r"(\d+)-(\d+)", item)) or int(match[1]) > int(match[2])
            ):
                raise ValueError(f'{item!r} is no range of blocks. Write one such as "10-19", or a number.')
        return value

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield targets that the predictor does not have, and what would be another LoRA than it looks."""
        if "predictor" not in spec.choices:
            return
        if (weights := spec.choices["adapter"].weights) is not None:
            yield from not_lora(weights.name, weights.config)
        if self.targets is not None or self.blocks is not None or not _usual(spec):
            yield from self._unmatched(spec)
        for choice in spec.parallel if self.dropout else ():
            split = [
                axis for axis, size in choice.config.degrees().items() if axis in SPLITTING and size != 1
            ]
            if split:
                yield Problem(
                    "dropout",
                    f"ranks of {choice.name!r} have a part of the {SPLITTING[split[0]]} each, and would drop "
                    "other inputs than one process does. Set dropout: 0, or share out rows only (ddp, zero1, "
                    "zero2, zero3, layerzero).",
                )

    def _unmatched(self, spec: Spec) -> Iterable[Problem]:
        import torch  # only a model knows its modules

        from cvx_plugins.lora.adapter import BlocksError, targets

        with torch.device("meta"):
            predictor = spec.choices["predictor"].build(Deps(spec))
        try:
            targets(predictor, self.where(spec))
        except CvxError as error:
            yield Problem("blocks" if isinstance(error, BlocksError) else "targets", str(error))

    def where(self, spec: Spec | None) -> Where:
        """Return which layers are meant: the targets, or the predictor's usual ones, in the blocks stated."""
        patterns = self.targets if self.targets is not None else _usual(spec)
        if self.blocks is None:
            return Where(patterns)
        plan = getattr(spec.config("predictor"), "plan", None) if spec is not None else None
        chosen: set[int] = set()
        for item in self.blocks:
            first, _, last = str(item).partition("-")
            chosen |= set(range(int(first), int(last or first) + 1))
        return Where(patterns, plan().blocks if plan is not None else "blocks", tuple(sorted(chosen)))


class MergedLoraConfig(Config):
    """LoRA weights from a file, worked into the predictor's while these are loaded."""

    section: ClassVar[str] = "adapters"

    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Weight of its change; 0 leaves the predictor as it is."""
    alpha: Alpha | None = None
    """Alpha of all modules, for a file that states none."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield what keeps it from being loaded."""
        mine = next((c for c in spec.adapters if c.config is self), None)
        if mine is not None and mine.weights is not None:
            yield from not_lora(mine.weights.name, mine.weights.config)
        predictor = spec.choices.get("predictor")
        if predictor is not None and predictor.weights is None:
            yield Problem("", "changes weights, and the predictor has none. Add `predictor: {weights: ...}`.")


def not_lora(name: str, config: object) -> Iterable[Problem]:
    """Yield that a format holds no LoRA weights, if so."""
    if getattr(config, "holds", "") != "lora":
        other = getattr(config, "lora_format", None)
        hint = f" Did you mean {other!r}?" if other else ""
        yield Problem("weights.use", f"format {name!r} does not hold LoRA weights.{hint}")


def _usual(spec: Spec | None) -> tuple[str, ...]:
    plan = getattr(spec.config("predictor"), "plan", None) if spec is not None else None
    return tuple(plan().lora) if plan is not None else ()
