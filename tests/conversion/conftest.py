"""Conversions run as the command does, ones that have to fail, and the content of what they write."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cvx_core import Registry
from cvx_io.conversion import Report, Request, prepare
from cvx_io.conversion.detect import formats_of
from cvx_io.tensors.pickles import load_pickle
from cvx_io.tensors.stored import Stored
from tests.conversion.sources import HF, convert_main


@pytest.fixture(scope="session")
def registry() -> Registry:
    return Registry.discover()


@pytest.fixture(scope="session")
def convert(registry):
    """Return a function that converts and gives the report."""

    def run(source: Path, target: Path, to: str, verified: bool = True, **options: Any) -> Report:
        return prepare(Request(source, target, to, **options), registry).run(verified)

    return run


@pytest.fixture(scope="session")
def made(shared, tmp_path_factory, convert):
    """Return a function that gives a source by its name: a golden, or `dcp` or `shards` made of one."""
    fixtures, folder = shared / "fixtures", tmp_path_factory.mktemp("made")
    convert(fixtures / HF, folder / "dcp", "dcp", verified=False)
    convert(fixtures / HF, folder / "shards", "hf", verified=False, settings={"shard_limit": 50_000})
    return lambda name: folder / name if name in ("dcp", "shards") else fixtures / name


@pytest.fixture
def copied(made, tmp_path):
    """Return a function that copies a source, to be damaged."""

    def copy(name: str) -> Path:
        source, target = made(name), tmp_path / "source"
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            target = target.with_suffix(source.suffix)
            shutil.copyfile(source, target)
        for path in (target, *target.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        return target

    return copy


@pytest.fixture
def fails(tmp_path, capsys, registry):
    """Return a function that runs the command, which has to fail, and gives the error.

    It exits with 2, without a traceback, and leaves nothing below the parent of its target: no weights that
    any format takes, and nothing else.
    """

    def run(source: Path | str, *options: object, target: Path | str | None = None) -> str:
        folder = tmp_path / "targets"
        folder.mkdir(exist_ok=True)
        to = [] if "--to" in options else ["--to", "hf"]
        words = [str(source), str(target or folder / "out"), *to, *map(str, options)]
        assert convert_main(words) == 2
        output = capsys.readouterr()
        assert not [path for path in folder.rglob("*") if formats_of(path, registry)]
        assert not list(folder.iterdir())
        assert "Traceback" not in output.out + output.err
        assert output.err.endswith(("\n", ".\n"))
        return output.err

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
