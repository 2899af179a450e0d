"""Joining the other processes: a store that does not answer keeps nobody."""

import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from cvx_core import CvxError, joining
from cvx_core.world import World


def test_a_store_that_takes_connections_but_never_answers_is_an_error(monkeypatch):
    """As that of a first process which is stopped: the system still accepts for it."""
    monkeypatch.setattr(joining, "LATER_S", 0.5)
    with socket.create_server(("localhost", 0)) as silent:
        port = silent.getsockname()[1]
        for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        spec = SimpleNamespace(run=SimpleNamespace(timeout_s=0.5))
        began = time.monotonic()
        with (
            pytest.raises(CvxError, match=rf"store of this run at localhost:{port} has not answered for 1 s"),
            joining.joined(World(rank=1, size=2), spec, torch.device("cpu")),
        ):
            pass
        assert time.monotonic() - began < 10


def test_what_is_asked_of_a_store_comes_back_as_it_is():
    assert joining._in_time(10.0, lambda: None) is None
    assert joining._in_time(10.0, threading.current_thread) is not threading.current_thread()
    with pytest.raises(KeyError, match="facts"):
        joining._in_time(10.0, lambda: {}["facts"])
