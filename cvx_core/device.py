"""The device table: what differs between cpu, cuda and npu. The only place that names an accelerator's own
module.
"""

from __future__ import annotations

import ctypes
import importlib
import resource
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cvx_core.errors import CvxError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DeviceKind:
    """backend: torch.distributed backend; module: package that must be imported first; bfloat16_pays: see
    dtype().
    """

    backend: str
    module: str | None = None
    bfloat16_pays: bool = True


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h

TABLE = {
    "cpu": DeviceKind("gloo", bfloat16_pays=False),
    "cuda": DeviceKind("nccl"),
    "npu": DeviceKind("hccl", module="torch_npu"),
}


def pick(name: str, local_rank: int = 0) -> torch.device:
    """Return the torch device for a recipe's `device`. Raises CvxError where it is not there."""
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        name = accelerator.type if accelerator is not None else "cpu"
    kind = TABLE.get(name)
    if kind is None:
        raise CvxError(f"device {name!r} is not supported. Use one of: {', '.join(TABLE)}.")
    if kind.module is not None:
        try:
            importlib.import_module(kind.module)
        except ImportError as error:
            raise CvxError(
                f"device {name!r} needs the package {kind.module!r}: {error}. Install it."
            ) from error
    if name == "cpu":
        return torch.device("cpu")
    if not getattr(torch, name).is_available():
        raise CvxError(f"device {name!r} was asked for, but none is available here. Use device: auto or cpu.")
    count = getattr(torch, name).device_count()
    if local_rank >= count:
        raise CvxError(
            f"this is process {local_rank + 1} on a host with {count} {name} devices. "
            f"Start at most {count} here (torchrun --nproc-per-node {count})."
        )
    return torch.device(name, local_rank)


def dtype(name: str, device: torch.device, release: str | None) -> torch.dtype:
    """Return the torch dtype for a recipe's `dtype`; `auto` follows the release where the device is fast at
    it.
    """
    import torch

    if name == "auto":
        name = release if release is not None and TABLE[device.type].bfloat16_pays else "float32"
    result: torch.dtype = getattr(torch, name)
    return result


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes allocated on an accelerator, or the process's peak resident bytes on the CPU."""
    import torch

    if device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(getattr(torch, device.type).max_memory_allocated(device))


def name(device: torch.device) -> str:
    """Return the accelerator's own name, "cpu" for the CPU."""
    import torch

    return "cpu" if device.type == "cpu" else str(getattr(torch, device.type).get_device_name(device))


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    import torch

    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def seed(device: torch.device, value: int) -> None:
    """Seed torch's own generators: that of the CPU, and those of the accelerators where one is used.

    torch.manual_seed does all, and for one that is not there it notes the whole stack of calls each time.
    """
    import torch

    if device.type == "cpu":
        torch.default_generator.manual_seed(value)
    else:
        torch.manual_seed(value)


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees, instead of asking the system for it again.

    The C library gives large blocks back at once, and each page of the next one costs a fault: on the CPU a
    training step spends a tenth of its time there. For a process of ours only: it is a setting of the whole
    process. Blocks of over 32 MiB still go back. Does nothing where the C library has no such setting.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
