"""vae-cp: the autoencoder codes one clip on several ranks. No torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import ClassVar

from cvx_core import Component, Problem
from cvx_core.degrees import SEVERAL
from cvx_core.spec import Spec
from cvx_core.strategy import Stage, StrategyConfig
from cvx_plugins.parallel.borrowing import lone


class VaeCPConfig(StrategyConfig):
    """Ranks that see the same rows take chunks of a clip in turns; the result is the same to the bit.

    In one pass too, where the autoencoder's channels are a multiple of 32, as those of the releases are; else
    activations may differ in their last bit.
    """

    stage: ClassVar[Stage] = Stage.AUTOENCODER

    def limits(self, spec: Spec) -> Mapping[str, Container[int]]:
        """Return 2 or more that see the same rows."""
        return {"model": SEVERAL}

    def check(self, spec: Spec) -> Iterable[Problem]:
        yield from lone(spec, "codes chunks of a clip")
        if "autoencoder" in getattr(spec.config("dataset"), "replaces", ()):
            yield Problem(
                "",
                f"dataset {spec.name_of('dataset')!r} is encoded already, so no clip is coded. Name the "
                "clips themselves, or remove this strategy.",
            )
        config, name = spec.config("autoencoder"), spec.name_of("autoencoder")
        if config is not None and not getattr(config, "in_chunks", False):
            yield Problem(
                "", f"autoencoder {name!r} cannot code a clip on several ranks. Remove this strategy."
            )
        if getattr(spec.config("task"), "trains", None) == "autoencoder":
            yield Problem(
                "",
                f"carries no gradients, but task {spec.name_of('task')!r} trains the autoencoder. "
                "Remove this strategy.",
            )


def components() -> Iterable[Component]:
    """Yield the strategy."""
    yield Component(
        "strategy",
        "vae-cp",
        VaeCPConfig,
        "cvx_plugins.parallel.vae_cp:VaeCP",
        summary="chunks of a clip shared by ranks that see the same rows",
    )
