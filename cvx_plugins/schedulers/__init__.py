"""Built-in schedulers: noise schedule, training draw and samplers. Code is imported when it is built."""

from __future__ import annotations

from collections.abc import Iterable

from cvx_core import Component, hookimpl
from cvx_plugins.schedulers.scheduler_config import DDIMConfig, DPMConfig


@hookimpl
def cvx_components() -> Iterable[Component]:
    yield Component(
        "scheduler",
        "ddim",
        DDIMConfig,
        "cvx_plugins.schedulers.ddim:build",
        summary="Deterministic first-order sampler",
    )
    yield Component(
        "scheduler",
        "dpm",
        DPMConfig,
        "cvx_plugins.schedulers.dpm:build",
        summary="DPM-Solver++ (2M), stochastic or deterministic second-order sampler",
    )
