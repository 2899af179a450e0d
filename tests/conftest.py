"""Fixtures shared by every test: the reference data folder, and one thread per process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would mostly wait for each other


def shared_folder() -> Path:
    """Return the folder with reference goldens and clips: CVX_SHARED, or `shared` beside the project."""
    return Path(os.environ.get("CVX_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference folder; tests that need it skip where it is absent, but never in CI."""
    folder = shared_folder()
    if not folder.is_dir():
        if os.environ.get("CVX_REQUIRE_SHARED"):
            pytest.fail(f"reference folder {folder} is absent; set CVX_SHARED")
        pytest.skip(f"reference folder {folder} is absent; set CVX_SHARED")
    return folder
