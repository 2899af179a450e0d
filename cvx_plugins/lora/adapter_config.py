"""Config of the LoRA adapter. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from cvx_core import Config
from cvx_core.config import Positive
from cvx_core.errors import CvxError, Problem
from cvx_core.interfaces import Deps

if TYPE_CHECKING:
    from cvx_core.spec import Spec


class LoraConfig(Config):
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W + alpha / rank * B A, with W frozen."""

    rank: Positive = 128
    """Columns of B and rows of A."""
    alpha: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 64.0
    """The change of a weight is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability that an input of A is dropped in training."""
    targets: tuple[str, ...] | None = None
    """Linear layers, by the last components of their names, in each of which * stands for anything; null:
    those that the predictor names.
    """

    @field_validator("targets")
    @classmethod
    def _some(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not value:
            raise ValueError("is an empty list, so nothing would be trained; leave it out.")
        return value

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield targets that the predictor does not have, and adapters that would do nothing."""
        if "predictor" not in spec.choices:
            return
        weights = spec.choices["adapter"].weights
        if weights is not None:
            yield Problem(
                "weights",
                "cannot be loaded by a recipe. Merge them into the predictor's weights with `cvx convert`.",
            )
        elif spec.config("task") is not None and spec.config("task").trains != "predictor":
            yield Problem("", f"changes nothing in task {spec.name_of('task')!r}, untrained. Remove it.")
        if self.targets is not None or not _usual(spec):
            yield from self._unmatched(spec)

    def _unmatched(self, spec: Spec) -> Iterable[Problem]:
        import torch  # only a model knows its modules

        from cvx_plugins.lora.adapter import targets

        with torch.device("meta"):
            predictor = spec.choices["predictor"].build(Deps(spec))
        try:
            targets(predictor, self.patterns(spec))
        except CvxError as error:
            yield Problem("targets", str(error))

    def patterns(self, spec: Spec | None) -> tuple[str, ...]:
        """Return the targets, or the predictor's usual ones."""
        return self.targets if self.targets is not None else _usual(spec)


def _usual(spec: Spec | None) -> tuple[str, ...]:
    plan = getattr(spec.config("predictor"), "plan", None) if spec is not None else None
    return tuple(plan().lora) if plan is not None else ()
