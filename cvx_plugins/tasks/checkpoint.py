"""What a run keeps besides tensors to go on from, and what a changed recipe does to a run that goes on."""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from cvx_core.building import MODULES
from cvx_core.errors import FormatError
from cvx_core.interfaces import Parts
from cvx_core.mesh import Mesh
from cvx_core.spec import Spec

log = logging.getLogger("cvx")
_SAMPLES = 64
"""Values of each tensor that count for its fingerprint."""


def facts(parts: Parts, spec: Spec) -> dict[str, Any]:
    """Return what stands in the manifest of each checkpoint of a run, and does not change while it runs.

    `frozen`: fingerprints of the weights that checkpoints do not hold; of the trained module, those which an
    adapter leaves as they are. Collective over the world where there are such.
    """
    held = {section: getattr(parts, section) for section in MODULES if section != parts.trains}
    frozen = {
        section: fingerprint(module.named_parameters())
        for section, module in held.items()
        if isinstance(module, nn.Module)
    }
    if parts.trains is not None:
        base = [(name, p) for name, p in parts.trained.named_parameters() if name not in parts.trainable]
        if parts.adapter is not None:
            frozen[parts.trains] = fingerprint(base, parts.mesh)
    return {
        "recipe": spec.resolved,
        "digest": spec.digest,
        "versions": versions(spec),
        "frozen": frozen,
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


class _Sampled(NamedTuple):
    """What one rank holds of a tensor's samples. numbers: which ones, ascending; values: their bytes."""

    about: str
    numbers: list[int]
    values: bytes


def fingerprint(params: Iterable[tuple[str, Tensor]], mesh: Mesh | None = None) -> str:
    """Return 16 hex digits of weights: names, shapes, dtypes, and evenly spaced values of each.

    Cheap, since of each tensor 64 values are read; so it tells other weights and other precisions, and not a
    change of single values. With a mesh it is that of all ranks' parts together, however they are spread.
    """
    everyone: list[Any] = [{name: _sampled(name, param) for name, param in params}]
    if mesh is not None and mesh.degrees.world > 1:
        everyone *= mesh.degrees.world
        dist.all_gather_object(everyone, everyone[0])
    digest = hashlib.sha256()
    for name in sorted(set().union(*everyone)):
        samples: dict[int, bytes] = {}
        parts = [rank[name] for rank in everyone if name in rank]
        for part in parts:
            size = len(part.values) // max(len(part.numbers), 1)
            samples |= {number: part.values[i * size :][:size] for i, number in enumerate(part.numbers)}
        digest.update(parts[0].about.encode())
        digest.update(b"".join(samples[number] for number in sorted(samples)))
    return digest.hexdigest()[:16]


@torch.no_grad()
def _sampled(name: str, param: Tensor) -> _Sampled:
    """Return those of up to 64 evenly spaced values, first and last among them, that this rank holds."""
    about, count = f"{name} {tuple(param.shape)} {param.dtype}", param.numel()
    places = torch.linspace(0, count - 1, min(count, _SAMPLES), dtype=torch.float64).long()
    at = torch.stack(torch.unravel_index(places, param.shape)) if param.ndim else places[None, :0]
    mine, held = param.detach(), torch.ones(len(places), dtype=torch.bool)
    if isinstance(mine, DTensor):
        size, start = compute_local_shape_and_global_offset(mine.shape, mine.device_mesh, mine.placements)
        at = at - torch.tensor(start)[:, None]
        held = ((at >= 0) & (at < torch.tensor(size)[:, None])).all(dim=0)
        mine = mine.to_local()
    index = tuple(row.to(mine.device) for row in at[:, held])
    values = (mine[index] if param.ndim else mine[None]).cpu().contiguous().view(torch.uint8)
    return _Sampled(about, held.nonzero()[:, 0].tolist(), values.numpy().tobytes())


def check_base(path: Path, manifest: Mapping[str, Any], now: Mapping[str, Any], trained: str | None) -> bool:
    """Return whether a checkpoint also holds the weights that an adapter leaves as they are: older ones do.

    Raises FormatError where it does not, and the recipe's are others than it was trained on.
    """
    old, new = manifest.get("frozen", {}).get(trained), now["frozen"].get(trained)
    if old is None or new is None:
        return new is not None
    if old != new:
        paths = (trained, "model", "seed", "dtype", "device")
        changed = changes(manifest["recipe"], now["recipe"])
        said = [f"{name}: {a} -> {b}" for name, a, b in changed if name.partition(".")[0] in paths]
        since = f"; changed since: {', '.join(said)}" if said else ""
        raise FormatError(
            f"{path}: its adapter was trained on other weights of {trained} than the recipe gives "
            f"(fingerprint {old}, now {new}){since}. Give the old ones again, "
            "with the same dtype, or start a new run from the adapter's file, with adapter.weights."
        )
    return False


def tell(manifest: Mapping[str, Any], now: Mapping[str, Any], trained: str | None, new_epoch: bool) -> None:
    """Log how a run that goes on differs from the one that was saved, and what takes effect.

    manifest, now: the facts of both; new_epoch: whether the rows or their order changed.
    """
    step = int(manifest["step"])
    held = trained if trained not in manifest.get("frozen", {}) else None
    for path, old, new in changes(manifest["recipe"], now["recipe"]):
        log.info("  %s: %s -> %s: %s", path, old, new, effect(path, step, held, new_epoch))
    for name, old, new in changes(manifest.get("versions", {}), now["versions"]):
        log.warning(
            "%s was %s and is %s: results may differ from those of an undisturbed run", name, old, new
        )
    for section, old, new in changes(manifest.get("frozen", {}), now["frozen"]):
        if None not in (old, new) and section != trained:
            log.warning(
                "%s: not the weights that this run was trained with so far (fingerprint %s, was %s); the new "
                "ones are used from step %d on. Give the old ones again unless that is meant.",
                section,
                new,
                old,
                step + 1,
            )


def effect(path: str, step: int, held: str | None, new_epoch: bool) -> str:
    """Say what a changed recipe field does to a run that goes on from a step.

    held: the section whose weights the checkpoint holds all of.
    """
    section, _, rest = path.partition(".")
    if path in ("name", "output", "task.resume"):
        return "says where files are, and changes no step"
    if section in (held, "adapter") and rest.partition(".")[0] == "weights":
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
