"""From a spec to parts: modules on the meta device, plain components as they are. Allocates no weights."""

from __future__ import annotations

import logging
from typing import Any

import torch

from cvx_core import device as devices
from cvx_core import precision
from cvx_core.errors import PluginError
from cvx_core.interfaces import Deps, Parts
from cvx_core.mesh import Mesh
from cvx_core.registry import Choice
from cvx_core.spec import Spec
from cvx_core.world import World

MODULES = ("text_encoder", "autoencoder", "predictor")
PLAIN = ("scheduler", "dataset", "task")
log = logging.getLogger("cvx")


def build(spec: Spec) -> Parts:
    """Create every component of a spec in a fixed order and return them as parts, modules on meta.

    Raises PluginError where a factory allocates or keeps buffers, CvxError where the device is not there.
    """
    world = World.stated()
    device = devices.pick(spec.run.device, world.local_rank)
    mesh = Mesh(spec.mesh(world.size), world.rank, device.type)
    dtype = devices.dtype(spec.run.dtype, device, precision.usual(spec))
    deps = Deps(spec)
    made: dict[str, Any] = {
        section: _module(spec.choices[section], deps, dtype)
        for section in MODULES
        if section in spec.choices and section not in spec.unbuilt
    }
    trainable = _set_trainable(made, spec)
    added: frozenset[str] = frozenset()
    if "adapter" in spec.choices:
        own = {name for name, _ in made["predictor"].named_parameters()}
        made["adapter"] = spec.choices["adapter"].build(deps)
        trainable = frozenset(made["adapter"].apply(made["predictor"]))
        added = frozenset(name for name, _ in made["predictor"].named_parameters()) - own
    made |= {section: spec.choices[section].build(deps) for section in PLAIN if section in spec.choices}
    optimizer = spec.choices["optimizer"].build(deps) if "optimizer" in spec.choices else None
    make_optimizer = optimizer.build if optimizer is not None else None
    trains = spec.choices["task"].config.trains
    return Parts(
        device=device,
        mesh=mesh,
        trains=trains,
        trainable=trainable,
        added=added,
        make_optimizer=make_optimizer,
        **made,
    )


def _module(choice: Choice, deps: Deps, dtype: torch.dtype) -> torch.nn.Module:
    with torch.device("meta"):
        module = choice.build(deps)
    who = f"{choice.component.kind} {choice.name!r}"
    real = [name for name, p in module.named_parameters() if not p.is_meta]
    if real:
        raise PluginError(
            f"{who}: its factory allocates {len(real)} parameters, first {real[0]!r}; build on meta."
        )
    buffers = [name for name, _ in module.named_buffers()]
    if buffers:
        raise PluginError(
            f"{who}: keeps {len(buffers)} buffers, first {buffers[0]!r}; compute tables when they are used."
        )
    module.eval()
    result: torch.nn.Module = module.to(dtype).requires_grad_(False)
    return result


def _set_trainable(made: dict[str, Any], spec: Spec) -> frozenset[str]:
    section = spec.choices["task"].config.trains
    if section is None:
        return frozenset()
    made[section].requires_grad_(True)
    return frozenset(name for name, _ in made[section].named_parameters())
