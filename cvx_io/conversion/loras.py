"""LoRA weights in a conversion: which of a format's two sides is meant, alphas, and merging. No torch."""

from __future__ import annotations

import math
from pathlib import Path

from cvx_core.errors import FormatError
from cvx_core.interfaces import Tensors
from cvx_core.registry import Component, Registry
from cvx_io.conversion.detect import find_format, is_canonical, open_source, tables
from cvx_io.conversion.request import Request, Settings, configured, naming
from cvx_io.lora import alphas_of, merge, modules, with_alpha
from cvx_io.rename import NamesError

FAMILY = "lora"
"""Stands for the family of a model where only LoRA weights are converted."""


def holds_lora(component: Component) -> bool:
    """Tell whether a format is of LoRA weights alone."""
    return getattr(component.config, "holds", "") == "lora"


def is_wanted(source: Component, target: Component) -> bool:
    """Tell whether a conversion is of LoRA weights: one of its ends holds nothing else."""
    return holds_lora(source) or holds_lora(target)


def check_options(request: Request, source: Component, target: Component) -> None:
    """Raise FormatError on an option that this conversion has no use for."""
    if is_wanted(source, target):
        what = "converts LoRA weights alone"
        idle = {
            "--merge-lora": request.lora is not None,
            "--model": request.model is not None,
            "--set-model": bool(request.model_settings),
            "--scale": request.scale != 1,
        }
    else:
        what = "merges no LoRA weights"
        idle = {"--alpha": request.alpha is not None, "--scale": request.scale != 1}
        idle = {} if request.lora is not None else idle
    if given := [option for option, is_given in idle.items() if is_given]:
        raise FormatError(
            f"{given[0]}: does nothing here, as {source.name} to {target.name} {what}. Leave it out."
        )
    if not math.isfinite(request.scale):
        raise FormatError(f"--scale {request.scale}: expected a finite number, such as 0.8.")


def formats(source: Component, target: Component, registry: Registry) -> tuple[Component, Component]:
    """Return both ends as formats of LoRA weights. Raises FormatError where one cannot hold them."""
    if is_canonical(source) and not holds_lora(source):
        known = ", ".join(c.name for c, _ in registry.all("format") if holds_lora(c))
        raise FormatError(
            f"{source.name!r} holds a model's weights, and no LoRA weights apart from them. If these are "
            f"LoRA weights, say of which format with --from: {known}."
        )
    ends = []
    for component in (source, target):
        if not holds_lora(component):
            name = getattr(component.config, "lora_format", None)
            if name is None:
                able = [c.name for c, _ in registry.all("format") if holds_lora(c)]
                raise FormatError(
                    f"format {component.name!r} holds no LoRA weights. Formats that do: {', '.join(able)}."
                )
            component = registry.get("format", name)
        ends.append(component)
    return ends[0], ends[1]


def source_settings(request: Request, source: Component) -> Settings:
    """Return the source's settings; a file whose own LoRA is merged is read without it."""
    assert source.config is not None
    own = request.lora is not None and request.lora.resolve() == request.source.resolve()
    return (
        {"lora": "drop", **request.source_settings}
        if own and "lora" in source.config.model_fields
        else request.source_settings
    )


def opened(request: Request, source: Component, registry: Registry) -> tuple[Tensors, str]:
    """Return a source's LoRA weights with alphas, and a note. Raises FormatError where alphas are missing."""
    return _opened(request.source, source, request.source_settings, request.alpha, registry)


def merged(base: Tensors, request: Request, registry: Registry) -> tuple[Tensors, str]:
    """Return a model's weights with LoRA weights merged in, and a note."""
    assert request.lora is not None
    component = find_format(request.lora, registry)
    with naming(request, request.lora):
        source, _ = formats(component, component, registry)
    lora, note = _opened(request.lora, source, {}, request.alpha, registry)
    with naming(request, request.lora):
        result = merge(base, lora, request.scale)
    return result, f"merged {request.lora} (scale {request.scale:g}; {note})"


def family(registry: Registry, target: Component) -> str:
    """Return the family whose LoRA names a format has."""
    found = [name for name, _ in tables(registry, target.name)]
    if not found:
        raise FormatError(f"no names tables for {target.name!r}. Install a plugin that has one.")
    return found[0]


def _opened(
    path: Path, component: Component, settings: Settings, alpha: float | None, registry: Registry
) -> tuple[Tensors, str]:
    fmt = component.load()(configured(component, settings, "--set-from"), None)
    try:
        found = (
            fmt.open(path)
            if is_canonical(component)
            else open_source(path, fmt, component, registry, None)[0]
        )
    except NamesError as error:
        raise FormatError(f"{error} Does it hold LoRA weights?") from error
    stated = with_alpha(found, alpha, str(path))
    ranks = sorted({rank for rank, *_ in modules(stated).values()})
    alphas = sorted(set(alphas_of(stated).values()))
    where = "as given" if alpha is not None else "as the file states"
    return stated, f"rank {_few(ranks)}, alpha {_few(alphas)} {where}"


def _few(values: list[float] | list[int]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:4])
    return shown if len(values) <= 4 else f"{shown} and others"
