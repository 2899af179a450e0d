"""What a run keeps besides tensors to go on from, and what a changed recipe does to a run that goes on."""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from cvx_core.building import MODULES
from cvx_core.interfaces import Parts
from cvx_core.spec import Spec

log = logging.getLogger("cvx")
_SAMPLES = 64
"""Values of each tensor that count for its fingerprint."""


def facts(parts: Parts, spec: Spec) -> dict[str, Any]:
    """Return what stands in the manifest of each checkpoint of a run, and does not change while it runs."""
    frozen = {section: getattr(parts, section) for section in MODULES if section != parts.trains}
    return {
        "recipe": spec.resolved,
        "digest": spec.digest,
        "versions": versions(spec),
        "frozen": {name: fingerprint(part) for name, part in frozen.items() if isinstance(part, nn.Module)},
    }


def versions(spec: Spec) -> dict[str, str]:
    """Return the versions of Python, torch and the packages whose components the recipe uses."""
    owners = {(component.kind, component.name): package for component, package in spec.registry.all()}
    used = [*spec.choices.values(), *spec.parallel]
    used += [choice.weights for choice in used if choice.weights is not None]
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in sorted({owners.get((c.component.kind, c.component.name), "") for c in used}):
        with suppress(
            metadata.PackageNotFoundError, ValueError
        ):  # a component may be given without a package
            found[package] = metadata.version(package)
    return found


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """Return 16 hex digits of a module's weights: names, shapes, dtypes, and evenly spaced values of each.

    Cheap, since of each tensor 64 values are read; so it tells other weights and other precisions, and not a
    change of single values.
    """
    digest = hashlib.sha256()
    for name, param in sorted(module.named_parameters()):
        values = _spread(param.detach()).to("cpu").contiguous().view(torch.uint8)
        digest.update(f"{name} {tuple(param.shape)} {param.dtype}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def _spread(tensor: Tensor) -> Tensor:
    """Return up to 64 evenly spaced values, the first and the last among them, as a vector."""
    count = tensor.numel()
    places = torch.linspace(0, count - 1, min(count, _SAMPLES), dtype=torch.float64).long()
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.contiguous().reshape(-1)
    return flat[places.to(tensor.device)]


def tell(manifest: Mapping[str, Any], now: Mapping[str, Any], trained: str | None, new_epoch: bool) -> None:
    """Log how a run that goes on differs from the one that was saved, and what takes effect.

    manifest, now: the facts of both; new_epoch: whether the rows or their order changed.
    """
    step = int(manifest["step"])
    for path, old, new in changes(manifest["recipe"], now["recipe"]):
        log.info("  %s: %s -> %s: %s", path, old, new, effect(path, step, trained, new_epoch))
    for name, old, new in changes(manifest.get("versions", {}), now["versions"]):
        log.warning(
            "%s was %s and is %s: results may differ from those of an undisturbed run", name, old, new
        )
    for section, old, new in changes(manifest.get("frozen", {}), now["frozen"]):
        if old is not None and new is not None:
            log.warning(
                "%s: not the weights that this run was trained with so far (fingerprint %s, was %s); the new "
                "ones are used from step %d on. Give the old ones again unless that is meant.",
                section,
                new,
                old,
                step + 1,
            )


def effect(path: str, step: int, trained: str | None, new_epoch: bool) -> str:
    """Say what a changed recipe field does to a run that goes on from a step."""
    section, _, rest = path.partition(".")
    if path in ("name", "output", "task.resume"):
        return "says where files are, and changes no step"
    if section in (trained, "adapter") and rest.partition(".")[0] == "weights":
        return "NO EFFECT, since these weights come from the checkpoint"
    if path == "seed":
        data = "the order of rows" if new_epoch else "rows"
        return f"takes effect from step {step + 1} on for {data}, timesteps and noise, not for first weights"
    if section in ("dataset", "loader") and new_epoch:
        return f"takes effect from step {step + 1} on, with a new epoch"
    return f"takes effect from step {step + 1} on"


def changes(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, old, new) for every value in which two trees of plain values differ; None where absent."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from changes(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, old, new
