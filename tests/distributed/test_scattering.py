"""Gradients averaged, of which each rank keeps rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cvx_core.mesh import Degrees, Mesh
from cvx_parallel import scattering as mechanism
from cvx_parallel.scattering import Scattering
from tests.distributed.harness import on_ranks
from tests.distributed.test_averaging import Mixed

WORLD = 3


def scattered(dtype: torch.dtype | None) -> dict[str, Any]:
    """Take steps of two batches; return gradients put together, those of one process, rows, memory kept."""
    mechanism.BUCKET = 200
    mesh = Mesh(Degrees({"dp_replicate": WORLD}), dist.get_rank())
    module, alone = Mixed(), Mixed()
    exchange = Scattering(module, mesh, dtype)
    clips = torch.randn(3, WORLD, 2, 3, generator=torch.Generator().manual_seed(1))
    seen, wanted, rows = [], [], []
    for step, batches in enumerate(clips):
        module.is_turned = step == 1
        for k in range(2):
            exchange.before(k == 1)
            module(batches[mesh.rank, k, None]).backward()
            if k == 0:
                assert all(type(p.grad) is torch.Tensor for p in module.parameters())
        for clip in batches.reshape(-1, 1, 3):
            alone(clip).backward()  # not of a share: the layer in bfloat16 would round otherwise
        rows.append([p.grad.to_local().shape for p in module.parameters()])
        seen.append([p.grad.full_tensor() for p in module.parameters()])
        wanted.append([p.grad / WORLD for p in alone.parameters()])
        for model in (module, alone):
            nn.Module.zero_grad(model, set_to_none=True)
    return {"seen": seen, "wanted": wanted, "rows": rows, "spare": len(exchange._spare)}


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_each_rank_keeps_its_rows_of_the_averages(dtype):
    ranks = on_ranks(WORLD, scattered, dtype)
    for seen, wanted in zip(ranks[0]["seen"], ranks[0]["wanted"], strict=True):
        for got, want in zip(seen, wanted, strict=True):
            assert got.dtype == want.dtype
            is_coarse = torch.bfloat16 in (got.dtype, dtype)
            torch.testing.assert_close(got, want, **({"atol": 0.1, "rtol": 2e-2} if is_coarse else {}))
    for step in range(3):
        held = zip(*(rank["rows"][step] for rank in ranks), Mixed().parameters(), strict=True)
        for *shapes, param in held:
            chunks = [tuple(part.shape) for part in param.chunk(WORLD)]
            chunks += [(0, *param.shape[1:])] * (WORLD - len(chunks))
            assert [tuple(shape) for shape in shapes] == chunks
    assert all(rank["spare"] <= 3 for rank in ranks), "memory of buckets is used again"
