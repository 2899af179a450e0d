"""From parts on meta to parts on devices: strategies by stage, memory, then weights or initial values."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from cvx_core.building import MODULES
from cvx_core.interfaces import Deps, Parts, Tensors
from cvx_core.random import keyed
from cvx_core.registry import Choice
from cvx_core.spec import Spec
from cvx_core.weights import check_index, copy_into, copy_part

log = logging.getLogger("cvx")
Initial = Callable[[str, tuple[int, ...], torch.Generator], "Tensor | None"]


def place(parts: Parts, spec: Spec) -> Parts:
    """Apply the recipe's strategies, give every module memory, and fill it with weights.

    Raises FormatError listing names where a weights file does not fit; nothing is loaded then.
    """
    parts = parts.task.prepare(parts, spec)
    by_stage = sorted(spec.parallel, key=lambda choice: choice.config.stage)
    strategies = [choice.build(Deps(spec)) for choice in by_stage]
    for strategy in strategies:
        parts = strategy.apply(parts)
    for strategy in strategies:
        parts = strategy.finish(parts) if hasattr(strategy, "finish") else parts
    loaded: dict[str, Any] = {}
    for section in MODULES:
        module = getattr(parts, section)
        if module is not None:
            module.to_empty(device=parts.device)
            elsewhere = parts.elsewhere if section == "predictor" else {}
            own = section == "predictor" and parts.adapter is not None
            added = dict.fromkeys(parts.added, parts.adapter.initial) if own else {}
            change = partial(_changed, spec, loaded) if section == "predictor" and spec.adapters else None
            loaded[section] = fill(module, spec.choices[section], spec, section, elsewhere, added, change)
    if "adapter" in spec.choices and spec.choices["adapter"].weights is not None:
        loaded["adapter"] = _adopt(parts, spec)
    return replace(parts, loaded=loaded)


def fill(
    module: nn.Module,
    choice: Choice,
    spec: Spec,
    section: str,
    elsewhere: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    added: Mapping[str, Initial] = MappingProxyType({}),
    change: Callable[[Tensors], Tensors] | None = None,
) -> dict[str, Any]:
    """Load a module's weights from the recipe's format, or initialise them from the seed.

    elsewhere: {parameter: shape} of those that other ranks hold; added: {parameter: what it starts as} of
    those that no file of the model holds; change: what is done to the file's tensors, which are whole then.
    Of a DTensor only the local part is copied.
    Returns the account of it, plain values: what each parameter came from, and what was left out and why.
    """
    if choice.weights is None:
        initialise(module, spec.run.seed, added)
        count = sum(p.numel() for p in module.parameters())
        log.info(
            "%s: %s initialised from seed %d (%s parameters)",
            section,
            choice.name,
            spec.run.seed,
            f"{count:,}",
        )
        return {"initialised": spec.run.seed, "parameters": count}
    source = choice.weights
    path = source.config.path
    family = getattr(choice.config, "family", choice.name)
    tensors = source.build(Deps(spec)).open(path, spec.registry.table(family, source.component))
    tensors = change(tensors) if change is not None else tensors
    params = dict(module.named_parameters())
    wanted = {name: tuple(parameter.shape) for name, parameter in params.items()} | dict(elsewhere)
    wanted = {name: shape for name, shape in wanted.items() if name not in added}
    aliases: Mapping[str, str | None] = getattr(module, "aliases", {})
    coverage = check_index(tensors.index, wanted, path, aliases)
    here = {name: target for name, target in coverage.consumed.items() if target in params}
    casts = copy_into(params, tensors.read(here), here)
    initialise(module, spec.run.seed, added, only=added)
    log.info("%s: %d tensors from %s", section, len(coverage.consumed), path)
    for (stored, wanted_dtype), count in casts.items():
        log.info("%s: %d tensors cast from %s to %s", section, count, stored, wanted_dtype)
    dropped = {**tensors.dropped, **coverage.dropped}
    for reason, names in _by_reason(dropped).items():
        log.info("%s: left out %d, such as %s: %s", section, len(names), names[0], reason)
    return {
        "path": str(path),
        "format": source.name,
        "consumed": {to: list(tensors.origins.get(name, (name,))) for name, to in coverage.consumed.items()},
        "dropped": dropped,
        "cast": [[stored, cast, count] for (stored, cast), count in casts.items()],
    }


def _opened(choice: Choice, spec: Spec) -> tuple[Tensors, str]:
    """Return the tensors that an adapter's weights name, and where they are."""
    source = choice.weights
    assert source is not None
    predictor = spec.choices["predictor"]
    family = getattr(predictor.config, "family", predictor.name)
    path = source.config.path
    return source.build(Deps(spec)).open(path, spec.registry.table(family, source.component)), str(path)


def _changed(spec: Spec, loaded: dict[str, Any], tensors: Tensors) -> Tensors:
    """Return the predictor's tensors as the recipe's loaded adapters change them, one after the other."""
    loaded["adapters"] = []
    for choice in spec.adapters:
        found, where = _opened(choice, spec)
        tensors, account = choice.build(Deps(spec)).changed(tensors, found, where)
        loaded["adapters"].append({"path": where, **account})
    return tensors


def _adopt(parts: Parts, spec: Spec) -> dict[str, Any]:
    """Fill the parameters that the adapter added from its file; return the account of it."""
    found, where = _opened(spec.choices["adapter"], spec)
    tensors = parts.adapter.adopt(found, where)
    here = {name: name for name, _ in parts.predictor.named_parameters() if name in parts.added}
    casts = copy_into(dict(parts.predictor.named_parameters()), tensors.read(here), here)
    log.info("adapter: %d tensors from %s", len(found.index), where)
    for (stored, wanted), count in casts.items():
        log.info("adapter: %d tensors cast from %s to %s", count, stored, wanted)
    return {"path": where, "consumed": {name: list(tensors.origins.get(name, (name,))) for name in here}}


def _by_reason(dropped: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, reason in dropped.items():
        groups.setdefault(reason, []).append(name)
    return groups


def initialise(
    module: nn.Module,
    seed: int,
    added: Mapping[str, Initial] = MappingProxyType({}),
    only: Collection[str] | None = None,
) -> None:
    """Fill parameters from (seed, their name), so that no layout or order of creation changes a value.

    added: {parameter: what it starts as} where that is not the module's business; only: the names of those to
    fill; None: all.
    """
    custom = getattr(module, "initial", None)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if only is not None and name not in only:
                continue
            generator, initial = keyed(seed, "parameter", name), added.get(name, custom)
            value = initial(name, tuple(parameter.shape), generator) if initial is not None else None
            if value is None:
                value = default_initial(name, tuple(parameter.shape), generator)
            copy_part(parameter, value)


def default_initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return zeros for a bias, ones for a norm's weight, else uniform in +-1/sqrt(fan_in), float32."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) < 2:
        return torch.ones(shape)
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
