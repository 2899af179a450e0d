"""Gradients that leave the device as soon as they are computed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class HostGradients:
    """Gradients of parameters, added up in host memory, where each has a parameter that stands for its own.

    On the device there is one gradient at a time.
    """

    def __init__(self, params: Iterable[Tensor]):
        self._stand_ins = {param: _stand_in(param) for param in params}
        for param in self._stand_ins:
            param.register_post_accumulate_grad_hook(self._take)

    def of(self, param: Tensor) -> Tensor:
        """Return what stands for a parameter. It has a gradient, and no values."""
        return self._stand_ins[param]

    def clear(self) -> None:
        """Forget the gradients."""
        for stand_in in self._stand_ins.values():
            stand_in.grad = None

    def _take(self, param: Tensor) -> None:
        stand_in, gradient = self._stand_ins[param], param.grad
        assert gradient is not None
        param.grad = None
        if stand_in.grad is None:
            stand_in.grad = gradient.to(stand_in.device)
        else:
            stand_in.grad.add_(gradient.to(stand_in.device))


def _stand_in(param: Tensor) -> nn.Parameter:
    """Return a parameter in host memory with a parameter's shape and dtype, but memory for one value."""
    host = "meta" if param.is_meta else "cpu"
    return nn.Parameter(torch.zeros((), dtype=param.dtype, device=host).expand(param.shape))
