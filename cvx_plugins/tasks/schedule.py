"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

from cvx_plugins.tasks import LoopConfig


def lr_scale(step: int, config: LoopConfig) -> float:
    """Return the factor on the learning rate for the optimizer step number `step`, counted from 0.

    Warm-up is linear and reaches 1 at step `warmup`; a decaying schedule reaches `final_lr` after the last
    step.
    """
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.final_lr + (1 - config.final_lr) * _decay(progress, config)


def _decay(progress: float, config: LoopConfig) -> float:
    """Return the undecayed share, 1 at progress 0."""
    if config.schedule == "linear":
        return 1 - progress
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if config.schedule == "cosine-restarts":
        return (1 + math.cos(math.pi * (progress * config.restarts % 1.0))) / 2
    if config.schedule == "polynomial":
        return float((1 - progress) ** config.power)
    return 1.0
