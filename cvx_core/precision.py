"""Which precision a recipe may ask for, by the release and by what is done with it. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cvx_core.errors import Problem

if TYPE_CHECKING:
    from cvx_core.spec import Spec


def usual(spec: Spec) -> str | None:
    """Return what `dtype: auto` is on an accelerator; None where no release says.

    That is the precision of the release, but training from a float16 one is in bfloat16, and so is what makes
    its features: gradients below float16's smallest number would vanish.
    """
    release = spec.card.dtype
    return "bfloat16" if release == "float16" and _is_of_training(spec) else release


def note(spec: Spec) -> str | None:
    """Return what is worth saying about `dtype: auto`, None where it is the precision of the release."""
    if spec.run.dtype != "auto" or spec.run.device == "cpu" or usual(spec) == spec.card.dtype:
        return None
    return (
        f"dtype: auto trains {spec.name_of('predictor')}, a {spec.card.dtype} release, in {usual(spec)} on "
        "accelerators"
    )


def problems(spec: Spec) -> Iterable[Problem]:
    """Yield why the recipe's stated dtype would do harm: float16 in training, or to a bfloat16 release."""
    if spec.run.dtype != "float16":
        return
    if getattr(spec.config("task"), "trains", None) is not None:
        yield Problem(
            "dtype",
            "is float16, in which small gradients and updates vanish: losses are not scaled against that. "
            "Train in bfloat16 or float32.",
        )
    elif spec.card.dtype == "bfloat16":
        name = spec.name_of("predictor")
        yield Problem(
            "dtype",
            f"is float16, but predictor {name!r} was released in bfloat16, and what it computes may pass "
            "float16's largest number, 65504. Use bfloat16 or float32; who knows better states "
            "predictor.card.dtype: float16.",
        )


def _is_of_training(spec: Spec) -> bool:
    task = spec.config("task")
    return getattr(task, "trains", None) is not None or getattr(task, "of_training", False)
