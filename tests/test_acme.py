"""Third-party packages, installed from outside the tree: listed, conforming, and training with a recipe."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cvx_core import run
from tests.distributed.harness import on_ranks

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"acme-wavedit": "predictor", "acme-hsdp": "strategy"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install the examples into a folder of their own; return what finds them, and their sources."""
    target, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source")
    for name in KINDS:
        subprocess.run(["cp", "-r", str(ROOT / "examples" / name), str(source / name)], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*pip, "--target", str(target), *(str(source / name) for name in KINDS)], check=True)
    return {**os.environ, "PYTHONPATH": str(target)}, source


def python(installed, *args, cwd):
    done = subprocess.run(
        [sys.executable, *args], env=installed[0], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_it_is_listed_with_its_package(installed, tmp_path, name, kind):
    out = python(installed, "-m", "cvx_core.run", "--list", kind, cwd=tmp_path)
    [line] = [line for line in out.splitlines() if name in line]
    assert line.split()[:3] == [kind, name, name]


@pytest.mark.parametrize("name", ["acme-wavedit", pytest.param("acme-hsdp", marks=pytest.mark.slow)])
def test_it_passes_the_conformance_kits(installed, tmp_path, name):
    tests = str(installed[1] / name / "tests")
    out = python(installed, "-m", "pytest", tests, "-p", "no:cacheprovider", cwd=tmp_path)
    assert " passed" in out


def test_a_predictor_trains_with_a_recipe(installed, tmp_path):
    recipe = str(installed[1] / "acme-wavedit/train.yaml")
    python(installed, "-m", "cvx_core.run", recipe, "--set", f"output={tmp_path}", cwd=tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "model/transformer/config.json").exists()


@pytest.mark.slow
def test_a_strategy_trains_with_a_recipe_on_several_processes(installed, tmp_path, monkeypatch):
    """The ranks look for packages where this process does; with torchrun, each would import torch anew."""
    recipe = str(installed[1] / "acme-hsdp/train.yaml")
    monkeypatch.syspath_prepend(installed[0]["PYTHONPATH"])
    assert on_ranks(4, run.main, [recipe, "--set", f"output={tmp_path}"]) == [0] * 4
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "model/transformer/config.json").exists()
