"""Where a run takes place: versions, hardware, and the commit of this program where it is a checkout."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import cvx_core

VARIABLES = (
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "ASCEND_RT_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NPU_ALLOC_CONF",
)
"""Environment variables that change results or memory; no other is recorded, for some hold secrets."""
GIT_TIMEOUT_S = 5.0


def now() -> str:
    """Return the time as ISO 8601, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def environment(device: str, device_name: str, world: int) -> dict[str, Any]:
    """Return what a run's figures depend on besides its recipe. world: processes of the run."""
    return {
        "device": device,
        "device_name": device_name,
        "processes": world,
        "host": socket.gethostname(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": _memory_gb(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cvx_commit": commit(Path(cvx_core.__file__).resolve().parent),
        "packages": packages("cvx"),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def packages(name: str) -> dict[str, str]:
    """Return the versions of a package and of those it asks for, as far as they are installed."""
    versions: dict[str, str] = {}
    requirements = [name]
    with suppress(metadata.PackageNotFoundError):
        requirements += [item for item in metadata.requires(name) or () if "extra ==" not in item]
    for item in requirements:
        match = re.match(r"[A-Za-z0-9._-]+", item)
        with suppress(metadata.PackageNotFoundError):
            if match is not None:
                versions[match.group()] = _version(match.group())
    return versions


@cache
def _version(name: str) -> str:
    """Return a package's version, which all of its metadata is read for."""
    return metadata.version(name)


def commit(package: Path) -> str | None:
    """Return the git commit of the checkout a package lies in, with "+changes" where files differ from it.

    None where the package is installed elsewhere, also where that is inside somebody else's checkout.
    """
    git = shutil.which("git")
    if git is None or not (package.parent / ".git").exists():
        return None
    command = [git, "-C", str(package.parent), "status", "--porcelain=v2", "--branch", "-uno"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    found = [line.split()[-1] for line in lines if line.startswith("# branch.oid")]
    changed = any(not line.startswith("#") for line in lines)
    return found[0] + ("+changes" if changed else "") if found else None


def cpu_name() -> str:
    """Return the processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    """Return the machine's memory, None where the system does not tell."""
    if sys.platform == "win32":
        return None
    with suppress(ValueError, OSError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    return None
