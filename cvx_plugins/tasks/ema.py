"""A running average of the trained weights: each rank averages what it holds of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cvx_parallel.gradients import local
from cvx_plugins.tasks.ema_config import EmaConfig


class Ema:
    """The averages of named parameters, DTensors where these are; no collective is needed.

    average: {name: tensor in at least float32}, part of the training state.
    """

    def __init__(self, config: EmaConfig, named: Sequence[tuple[str, Tensor]]):
        self._config, self._named = config, named
        self.average: dict[str, Tensor] = {}
        self.restart()

    @property
    def is_exported(self) -> bool:
        """Whether exports hold the averages."""
        return self._config.export

    @torch.no_grad()
    def restart(self) -> None:
        """Set the averages to the weights as they are."""
        self.average = {
            name: param.detach().to(torch.promote_types(param.dtype, torch.float32), copy=True)
            for name, param in self._named
        }

    def decay(self, step: int) -> float:
        """Return the share of the average that is kept after optimizer step number `step`, from 1 on."""
        since = step - self._config.start
        if since <= 0:
            return 0.0
        rising = (1 + since) / (10 + since) if self._config.warmup else 1.0
        return min(self._config.decay, rising)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after optimizer step number `step`, from 1 on, into the averages."""
        share = 1 - self.decay(step)
        for name, param in self._named:
            average = local(self.average[name])
            average.lerp_(local(param.detach()).to(average.dtype), share)

    @torch.no_grad()
    def put_in_place(self) -> None:
        """Set the weights to the averages, rounded to their precision."""
        for name, param in self._named:
            local(param.detach()).copy_(local(self.average[name]))

    @contextmanager
    def for_a_while(self) -> Iterator[None]:
        """Have the averages in the weights' place, which come back as they were. Takes their memory again."""
        kept = [(param, local(param.detach()).clone()) for _, param in self._named]
        self.put_in_place()
        try:
            yield
        finally:
            with torch.no_grad():
                for param, values in kept:
                    local(param.detach()).copy_(values)
