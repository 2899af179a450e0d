"""encoder-dp: the rows of a batch are encoded on several ranks. No torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any, ClassVar

from cvx_core import Component, Problem
from cvx_core.degrees import SEVERAL
from cvx_core.spec import Spec
from cvx_core.strategy import Stage, StrategyConfig
from cvx_plugins.parallel.borrowing import lone


class EncoderDPConfig(StrategyConfig):
    """Ranks that see the same rows encode different ones of them, then exchange what they found."""

    stage: ClassVar[Stage] = Stage.FEED

    def limits(self, spec: Spec) -> Mapping[str, Container[int]]:
        """Return 2 or more that see the same rows."""
        return {"model": SEVERAL}

    def check(self, spec: Spec) -> Iterable[Problem]:
        yield from lone(spec, "encodes rows of a batch")
        yield from unfed(spec)


def unfed(spec: Spec) -> Iterable[Problem]:
    """Yield why no batches go through the encoders while a task runs."""
    task: Any = spec.config("task")
    name = spec.name_of("task")
    if not {"text_encoder", "autoencoder", "loader"} <= {*task.needs, *task.optional}:
        yield Problem("", f"task {name!r} encodes no batches. Remove this strategy.")
    if "autoencoder" in getattr(spec.config("dataset"), "replaces", ()):
        yield Problem(
            "",
            f"dataset {spec.name_of('dataset')!r} is encoded already, so no batch needs an encoder. "
            "Name the clips themselves, or remove this strategy.",
        )
    if getattr(task, "memory", False):
        yield Problem(
            "",
            f"task {name!r} encodes every row once (memory: true), so later batches need no encoder. "
            "Set task.memory=false, or remove this strategy.",
        )


def components() -> Iterable[Component]:
    """Yield the strategy."""
    yield Component(
        "strategy",
        "encoder-dp",
        EncoderDPConfig,
        "cvx_plugins.parallel.encoder_dp:EncoderDP",
        summary="rows of a batch encoded by ranks that see the same ones",
    )
