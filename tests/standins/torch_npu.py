"""A stand-in for torch_npu on hosts without an NPU: what cvx asks of it, of two devices that note each call.

Importing it does to torch what importing the package does: names the device, adds torch.npu and the backend
hccl (here gloo's). No tensor can be put there. For processes of their own: a device is named for good.
"""

import types

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _DistributedBackendOptions

calls: list[tuple[str, str]] = []
"""What was called, and with which device."""
groups: list[tuple[int, int]] = []
"""Rank and size of the groups that were made of hccl."""


def _noted(name: str, value: object = None):
    def function(device: object) -> object:
        calls.append((name, str(device)))
        return value

    return function


npu = types.ModuleType("torch_npu.npu")
npu.is_available = lambda: True
npu.device_count = lambda: 2
npu.set_device = _noted("set_device")
npu.synchronize = _noted("synchronize")
npu.max_memory_allocated = _noted("max_memory_allocated", 12_345)
npu.get_device_name = _noted("get_device_name", "Ascend stand-in")


def _hccl(options: _DistributedBackendOptions, _of_hccl: object) -> dist.ProcessGroupGloo:
    groups.append((options.group_rank, options.group_size))
    return dist.ProcessGroupGloo(options.store, options.group_rank, options.group_size, options.timeout)


torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
dist.Backend.register_backend("hccl", _hccl, extended_api=True, devices=["npu"])
