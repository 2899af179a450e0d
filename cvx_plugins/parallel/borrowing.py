"""Strategies that own no axis: they share work among ranks that see the same rows. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable

from cvx_core.errors import Problem
from cvx_core.mesh import JOINED
from cvx_core.spec import Spec


def lone(spec: Spec, what: str) -> Iterable[Problem]:
    """Yield why there is nobody to share with: no strategy makes ranks that see the same rows.

    what: such as "decodes clips".
    """
    degrees = {axis: size for request in spec.requests for axis, size in request.degrees.items()}
    sizes = {axis: degrees.get(axis, 1) for axis in JOINED["model"]}
    if all(size == 1 for size in sizes.values()):
        arithmetic = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        yield Problem(
            "",
            f"{what} over the ranks that see the same rows, but {arithmetic} = 1 rank sees them. "
            "Add tp, cp or pp, or remove this strategy.",
        )


def samples_and_chunks(ranks: int, batch: int, *, by_sample: bool, by_chunk: bool) -> tuple[int, int]:
    """Return how ranks that see the same rows divide: samples of a batch x chunks of a clip.

    Where both are wanted, no sample is coded twice: as many share the batch as divide it.
    """
    if by_sample and by_chunk:
        samples = math.gcd(ranks, batch)
        return samples, ranks // samples
    return (ranks, 1) if by_sample else (1, ranks)
