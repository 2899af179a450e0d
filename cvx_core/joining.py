"""Joining the other processes of a run: a look at each, a group of all, and a watch over them meanwhile."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, TypeVar, cast

from cvx_core.device import TABLE
from cvx_core.errors import CvxError
from cvx_core.preflight import facts, preflight
from cvx_core.spec import Spec
from cvx_core.watch import Watch
from cvx_core.world import World

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

T = TypeVar("T")
LATER_S = 30.0
"""By how much a collective waits longer than the watch, which can say who is missing."""


@contextmanager
def joined(world: World, spec: Spec, device: torch.device) -> Iterator[Callable[[str], None]]:
    """Join the other processes for as long as the context lasts; alone, or where joined already, do nothing.

    Yields what states progress. An error inside is told to the others, so that all end; one that comes from
    a peer gives way to the watch, which names the peer. Raises CvxError where processes are missing or not
    alike, before any group forms. On accelerators the group has a CPU backend too, for checkpoints saved in
    the background.
    """
    import torch
    import torch.distributed as dist

    if world.size == 1 or dist.is_initialized():
        yield lambda _what: None
        return
    if device.type != "cpu":
        getattr(torch, device.type).set_device(device)
    timeout_s = spec.run.timeout_s
    store: Any = _in_time(timeout_s + LATER_S, lambda: _store(timeout_s))
    mine, asked = facts(spec, world, device), dist.PrefixStore("preflight", store)
    everyone = _in_time(timeout_s + LATER_S, lambda: preflight(asked, mine, world, timeout_s))
    names = [f"rank {one.rank} ({one.host}, process {one.pid})" for one in everyone]
    speaks = world.local_rank == 0 or world.rank == 1
    own = _in_time(timeout_s + LATER_S, lambda: _first_ranks_store(store, world, timeout_s))
    watch = Watch(own, world.rank, names, timeout_s, speaks)
    watch.start()
    try:
        dist.init_process_group(
            _backend(device.type),
            store=dist.PrefixStore("group", store),
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=timeout_s + LATER_S),
        )
        yield watch.mark
        dist.destroy_process_group()
    except BaseException as error:
        final = watch.final(error)  # the group is left as it is: taking it apart could wait for a peer
        if final is error:
            raise
        raise final from error
    watch.end()


def _in_time(limit_s: float, ask: Callable[[], T]) -> T:
    """Return what ask() returns or raise what it raises, in a thread of its own: a store on a host that is
    stopped or has vanished leaves calls without an answer, whatever timeout they were given.

    Raises CvxError where nothing has come after limit_s.
    """
    came: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            came.append((ask(), None))
        except BaseException as error:
            came.append((None, error))

    thread = threading.Thread(target=run, name="cvx-join", daemon=True)
    thread.start()
    thread.join(limit_s)
    if not came:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise CvxError(
            f"the store of this run at {where} has not answered for {limit_s:g} s. Look at the process that "
            "holds it: rank 0, or its launcher."
        )
    value, error = came[0]
    if error is not None:
        raise error
    return cast("T", value)


def _store(timeout_s: float) -> Store:
    """Return the launcher's key-value store."""
    import torch.distributed as dist

    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    except (ValueError, RuntimeError) as error:
        raise CvxError(
            f"the other processes cannot be found: {str(error).splitlines()[0]}. Launch with torchrun, "
            "or set MASTER_ADDR and MASTER_PORT to the host of rank 0 and a free port there."
        ) from error
    return store


def _first_ranks_store(store: Store, world: World, timeout_s: float) -> Store:
    """Return a store that lives in rank 0: a launcher ends, with its own, as soon as a rank of it dies."""
    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_s)
    if world.rank == 0:
        own = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        store.set("watch", f"{_address()} {own.port}")
        return own
    host, port = store.get("watch").decode().split()
    return dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)


def _address() -> str:
    """Return where the other hosts find this one: its side of a connection to the launcher's store."""
    master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with socket.create_connection(master) as connection:
        address = str(connection.getsockname()[0])
    return master[0] if ip_address(address).is_loopback else address


def _backend(device_type: str) -> str:
    backend = TABLE[device_type].backend
    return backend if device_type == "cpu" else f"cpu:gloo,{device_type}:{backend}"
