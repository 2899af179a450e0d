"""A third-party package, installed from outside the tree: listed, conforming, and training with a recipe."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install the example into a folder of its own; return the environment that finds it."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "acme"
    subprocess.run(["cp", "-r", str(ROOT / "examples/acme-wavedit"), str(source)], check=True)
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
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    return {**os.environ, "PYTHONPATH": str(target)}, source


def python(installed, *args, cwd):
    done = subprocess.run(
        [sys.executable, *args], env=installed[0], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_listed_with_its_package(installed, tmp_path):
    out = python(installed, "-m", "cvx_core.run", "--list", "predictor", cwd=tmp_path)
    [line] = [line for line in out.splitlines() if "acme-wavedit" in line]
    assert line.split()[:3] == ["predictor", "acme-wavedit", "acme-wavedit"]


def test_it_passes_the_conformance_kits(installed, tmp_path):
    out = python(
        installed, "-m", "pytest", str(installed[1] / "tests"), "-p", "no:cacheprovider", cwd=tmp_path
    )
    assert " passed" in out


def test_it_trains_with_a_recipe(installed, tmp_path):
    recipe = str(installed[1] / "train.yaml")
    python(installed, "-m", "cvx_core.run", recipe, "--set", f"output={tmp_path}", cwd=tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "model/transformer/config.json").exists()
