"""Optimizer state of parameters that lie on meshes: its shape as a whole, and loading it as it was saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def whole_shape(param: Tensor, value: Tensor) -> torch.Size:
    """Return the shape of a state as a whole; `value` is that of what this rank holds of a parameter.

    value: as many rows as that has; its other dims may be others, but for one that a mesh shares out.
    """
    if not value.ndim:
        return torch.Size()
    mine = param.to_local().shape if isinstance(param, DTensor) else param.shape
    times = [1] * value.ndim
    for dim in range(1, min(value.ndim, param.ndim)):
        times[dim] = param.shape[dim] // max(mine[dim], 1)
    rest = [size * count for size, count in zip(value.shape[1:], times[1:], strict=True)]
    return torch.Size((param.shape[0], *rest))


def contiguous(shape: torch.Size) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides, size = [], 1
    for extent in reversed(shape):
        strides.append(size)
        size *= max(extent, 1)
    return tuple(reversed(strides))


def laid_out(param: Tensor, value: Tensor) -> Tensor:
    """Return a state of what this rank holds, as a part of the whole where the parameter is one."""
    if not isinstance(param, DTensor) or not value.ndim:
        return value
    shape = whole_shape(param, value)
    return DTensor.from_local(
        value, param.device_mesh, param.placements, run_check=False, shape=shape, stride=contiguous(shape)
    )


def load_exactly(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Load what `state_dict` returned, each tensor in the precision and on the device it has there.

    Torch's own loading turns all of it into the precision of the parameter, which takes from a state what it
    was kept in float32 for.
    """
    torch.optim.Optimizer.load_state_dict(optimizer, {**state_dict, "state": {}})
    params = [param for group in optimizer.param_groups for param in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    for number, param in zip(numbers, params, strict=True):
        if number in state_dict["state"]:
            optimizer.state[param] = dict(state_dict["state"][number])
