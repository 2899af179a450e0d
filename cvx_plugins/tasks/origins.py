"""What features are made of: the encoders, weights and geometry of a recipe as plain, comparable values.

Nothing is built. Weights are told apart by their values under canonical names, so that the same weights in
another format, or another folder, are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cvx_core import device as devices
from cvx_core import precision
from cvx_core.config import path_fields
from cvx_core.interfaces import Deps
from cvx_core.registry import Choice
from cvx_core.spec import Spec
from cvx_io.cache.digests import Digests, files_under, tree_digest

CODE = 2
"""Raised when this code makes other features of the same inputs."""

_PICKING = ("frames", "height", "width", "fps", "start", "skip", "rule", "short")


def video_of(spec: Spec) -> dict[str, Any]:
    """Return what decides the pixels of a clip, besides its bytes."""
    return {name: getattr(spec.video, name) for name in _PICKING}


def encoder_of(spec: Spec, section: str, digests: Digests) -> dict[str, Any]:
    """Return what decides what an encoder makes of its input: fields, weights, dtype and code, flat."""
    choice = spec.choices[section]
    beside = getattr(choice.config, "beside_encoding", ())
    paths = path_fields(type(choice.config))
    stated: Mapping[str, Any] = json.loads(choice.config.model_dump_json(exclude=set(beside)))
    fields = {}
    for name, value in stated.items():
        given = getattr(choice.config, name)
        is_file = name in paths and isinstance(given, Path)
        fields[f"{section}.{name}"] = tree_digest(given, digests) if is_file else value
    return {
        f"{section}.use": choice.name,
        **fields,
        f"{section}.weights": weights_of(choice, spec, digests),
        "dtype": dtype_of(spec),
        "code": _code(spec, choice),
    }


def none_of(spec: Spec) -> dict[str, Any]:
    """Return what decides what stands for no prompt, besides what decides all embeddings."""
    config = spec.config("text_encoder")
    names = getattr(config, "beside_encoding", ())
    return {f"text_encoder.{name}": getattr(config, name) for name in names}


def dtype_of(spec: Spec) -> str:
    """Return the dtype that a run of this recipe encodes in, on this machine."""
    device = devices.pick(spec.run.device, 0)
    return str(devices.dtype(spec.run.dtype, device, precision.usual(spec))).removeprefix("torch.")


def weights_of(choice: Choice, spec: Spec, digests: Digests) -> str:
    """Return the seed that weights are drawn from, or a digest of every tensor in their files."""
    if choice.weights is None:
        return f"seed {spec.run.seed}"
    source = choice.weights
    path: Path = source.config.path
    name = f"weights {source.name} {path}"
    return digests.remember(name, files_under(path), lambda: _tensors_digest(choice, spec))


def files_of(spec: Spec, digests: Digests) -> dict[str, str]:
    """Return the digest of every file that the recipe's dataset lists its rows in."""
    config = spec.config("dataset")
    found = {}
    for name in path_fields(type(config)):
        value = getattr(config, name)
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path) and path.is_file():
                found[str(path)] = digests.of(path)
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield what changed from old to new ingredients, in words; values where they are short."""
    for name in [*old, *(name for name in new if name not in old)]:
        before, after = old.get(name), new.get(name)
        if before != after:
            digests = any(isinstance(value, str) and len(value) == 64 for value in (before, after))
            what = name.replace("_", " ").replace(".", " ") if name.endswith(".weights") else name
            yield f"{what} changed" if digests else f"{what} {before} -> {after}"


def _tensors_digest(choice: Choice, spec: Spec) -> str:
    """Return the SHA-256 of all tensors of a file, by name, shape, dtype and bytes; one is held at a time."""
    source = choice.weights
    assert source is not None
    family = getattr(choice.config, "family", choice.name)
    table = spec.registry.table(family, source.component)
    tensors = source.build(Deps(spec)).open(source.config.path, table)
    each = {}
    for name, tensor in tensors.read():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        each[name] = f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"
    return hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest()


def _code(spec: Spec, choice: Choice) -> str:
    """Return the version of the code that encodes: ours, and of the package an encoder comes from."""
    from importlib.metadata import version

    packages = {c.name: package for c, package in spec.registry.all(choice.component.kind)}
    package = packages.get(choice.name, "")
    is_other = bool(package) and package not in ("cvx", "(given directly)", "(unknown package)")
    return f"{CODE} {package} {version(package)}" if is_other else str(CODE)
