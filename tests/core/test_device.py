"""The device table: what is picked, and what is said where a device is not there."""

import ctypes
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from cvx_core import CvxError, device


def test_auto_takes_the_accelerator_else_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert device.pick("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.pick("auto", local_rank=1) == torch.device("cuda", 1)


def test_more_processes_than_devices_on_a_host_are_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(CvxError, match=r"process 3 on a host with 2 cuda devices\. Start at most 2"):
        device.pick("cuda", local_rank=2)


def test_a_device_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CvxError, match="'cuda' was asked for, but none is available"):
        device.pick("cuda")
    with pytest.raises(CvxError, match=r"'tpu' is not supported\. Use one of: cpu, cuda, npu"):
        device.pick("tpu")


def test_npu_imports_its_package_first(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(CvxError, match="'npu' needs the package 'torch_npu'"):
        device.pick("npu")
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setattr(torch, "npu", SimpleNamespace(is_available=lambda: False), raising=False)
    with pytest.raises(CvxError, match="none is available"):
        device.pick("npu")


@pytest.mark.parametrize(
    ("name", "where", "release", "expected"),
    [
        ("auto", "cpu", "bfloat16", torch.float32),
        ("auto", "cuda", "bfloat16", torch.bfloat16),
        ("auto", "cuda", None, torch.float32),
        ("float16", "cpu", "bfloat16", torch.float16),
    ],
)
def test_auto_precision_follows_the_release_on_accelerators(name, where, release, expected):
    assert device.dtype(name, torch.device(where), release) is expected


def test_peak_memory_of_the_cpu_is_the_process(monkeypatch):
    assert device.peak_memory(torch.device("cpu")) > 10_000_000


FAULTS = """
import resource, sys
from cvx_core.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(2):
    began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        several = [b"x" * 20_000_000 for _ in range(4)]
        del several
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_freed_memory_is_kept():
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < 100 < 1000 < faults("give back")
