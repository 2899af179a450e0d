"""Runs a function on several processes, forked from a server that has imported torch, joined by a file."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT_S = 120

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["cvx_core.testing.preload"])


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call function(*args) on each of `world` ranks; return what they return, by rank.

    The function is of a module's top level and sees RANK and WORLD_SIZE; torch's default group is joined.
    Raises AssertionError with the first rank's traceback where one fails, or does not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _context.Process(target=_entry, args=(rank, world, folder, function, args))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        end = time.monotonic() + TIMEOUT_S
        for process in ranks:
            process.join(max(end - time.monotonic(), 0))
        late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for process in ranks:
            process.kill()
        results = [_read(Path(folder) / str(rank)) for rank in range(world)]
    failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(results) if not ok]
    assert not failures, "\n".join(failures)
    assert not late, f"ranks {late} did not end within {TIMEOUT_S} s"
    return [value for _, value in results]


def _read(file: Path) -> tuple[bool, Any]:
    return pickle.loads(file.read_bytes()) if file.exists() else (False, "ended without a result")


def _entry(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        result = (True, function(*args))
    except BaseException:
        result = (False, traceback.format_exc())
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))
    os._exit(0 if result[0] else 1)  # a peer that waits for this rank must not keep it here
