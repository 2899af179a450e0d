"""Gradients averaged in buckets that are kept from step to step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cvx_parallel import averaging as mechanism
from cvx_parallel.averaging import Averaging
from tests.distributed.harness import on_ranks


class Mixed(nn.Module):
    """Two dtypes in turn, a weight larger than a bucket, one with strides of its own; two orders."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.small = nn.Linear(3, 5)
        self.narrow = nn.Linear(5, 4, dtype=torch.bfloat16)
        self.large = nn.Linear(4, 40)
        self.aside = nn.Linear(3, 4)
        self.is_turned = False
        self.video = nn.Conv2d(40, 2, 3).to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_turned:
            return self._aside(x) + self._along(x)
        return self._along(x) + self._aside(x)

    def _aside(self, x: torch.Tensor) -> torch.Tensor:
        return self.aside(x).square().sum()

    def _along(self, x: torch.Tensor) -> torch.Tensor:
        x = self.narrow(self.small(x).bfloat16()).float()
        return self.video(self.large(x)[:, :, None, None].expand(-1, -1, 3, 4)).sum()


def averaged() -> dict[str, Any]:
    """Take steps of two batches; return gradients of each as they are, and what they are to be."""
    mechanism.BUCKET = 200
    rank, world = dist.get_rank(), dist.get_world_size()
    module, alone = Mixed(), Mixed()
    averaging = Averaging(module, dist.group.WORLD)
    rows = torch.randn(5, world, 2, 3, generator=torch.Generator().manual_seed(1))
    addresses, seen, wanted = [], [], []
    for step, is_cleared in enumerate((True, True, False, False, True)):
        module.is_turned = step == 3
        for k in range(2):
            averaging.before(k == 1)
            module(rows[step, rank, k, None]).backward()
        for batch in rows[step].reshape(-1, 1, 3):
            (alone(batch) / world).backward()
        for model, kept in ((module, seen), (alone, wanted)):
            kept.append([p.grad.clone() for p in model.parameters()])
        addresses.append([p.grad.data_ptr() for p in module.parameters()])
        strides = [(p.grad.stride(), p.stride()) for p in module.parameters()]
        if is_cleared:
            module.zero_grad(set_to_none=True)
            alone.zero_grad(set_to_none=True)
        else:  # what stays is averaged already: one process has the same on all ranks
            for p, q in zip(module.parameters(), alone.parameters(), strict=True):
                q.grad = p.grad.clone()
    return {"seen": seen, "wanted": wanted, "addresses": addresses, "strides": strides}


def test_buckets_hold_the_averages_and_are_used_again():
    first, second = on_ranks(2, averaged)
    for seen, wanted in zip(first["seen"], first["wanted"], strict=True):
        for got, want in zip(seen, wanted, strict=True):
            atol, rtol = (0.05, 1e-2) if got.dtype == torch.bfloat16 else (1e-5, 1e-5)
            torch.testing.assert_close(got, want, atol=atol, rtol=rtol)
    for mine, other in zip(first["seen"], second["seen"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    addresses = first["addresses"]
    assert addresses[0] == addresses[1] == addresses[2] != addresses[3]
    assert all(got == own for got, own in first["strides"])
