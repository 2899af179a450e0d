"""Conversions run as the command does, and the content of what they write."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cvx_core import Registry
from cvx_io.conversion import Report, Request, prepare
from cvx_io.tensors.pickles import load_pickle
from cvx_io.tensors.stored import Stored


@pytest.fixture(scope="session")
def registry() -> Registry:
    return Registry.discover()


@pytest.fixture(scope="session")
def convert(registry):
    """Return a function that converts and gives the report."""

    def run(source: Path, target: Path, to: str, verified: bool = True, **options: Any) -> Report:
        return prepare(Request(source, target, to, **options), registry).run(verified)

    return run


def content(path: Path, key: str | None = "model") -> dict[str, Any]:
    """Return what a torch.save file holds under a key, tensors loaded."""
    tree = load_pickle(path)
    held = tree if key is None else tree[key]
    return {name: value.load() if isinstance(value, Stored) else value for name, value in held.items()}


def digest(state: Mapping[str, Any]) -> str:
    """Return the digest that `digests.json` states; its `digest_rule` defines it."""
    found = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        if isinstance(value, torch.Tensor):
            flat = value.contiguous().reshape(-1).view(torch.uint8) if value.numel() else torch.empty(0)
            parts = [name, str(value.dtype), str(tuple(value.shape))]
            found.update(b"\0".join(part.encode() for part in parts) + b"\0" + flat.numpy().tobytes())
        else:
            found.update(f"{name}\0{value!r}".encode())
    return found.hexdigest()


def assert_same(got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Assert that names, dtypes, shapes and bits are equal."""
    assert got.keys() == expected.keys(), sorted(got.keys() ^ expected.keys())[:5]
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
