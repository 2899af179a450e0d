"""This process among those of a run: rank and size as a launcher states them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cvx_core.errors import CvxError

_USUAL = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


@dataclass(frozen=True)
class World:
    """rank: this process, 0 is the first; size: processes in all; local_rank: this process on its host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def stated(cls) -> World:
        """Return what torchrun states in the environment; alone where nothing is.

        Raises CvxError where it contradicts itself.
        """
        values = {name: os.environ.get(name) for name in _USUAL}
        try:
            rank, size, local = (int(values[name] or usual) for name, usual in _USUAL.items())
        except ValueError as error:
            raise CvxError(f"the environment states {values}, not numbers. Launch with torchrun.") from error
        if not 0 <= rank < size:
            raise CvxError(f"the environment states RANK={rank} of WORLD_SIZE={size}. Launch with torchrun.")
        return cls(rank, size, local)
