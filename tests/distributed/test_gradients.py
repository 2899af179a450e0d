"""The norm of gradients on several meshes is that of one process, in one all-reduce, and so is what clips."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from cvx_core.mesh import Degrees, Mesh
from cvx_parallel.gradients import clip, total_norm
from tests.distributed.harness import on_ranks

WHOLE = torch.arange(35, dtype=torch.float64).view(5, 7) - 9
LAYOUTS = [
    (("dp_replicate", "dp_shard"), [Replicate(), Shard(0)]),
    (("dp_shard", "tp"), [Shard(1), Shard(0)]),
    (("dp_shard", "tp"), [Shard(0), Replicate()]),
    (("tp",), [Shard(1)]),
    ((), []),
]


def test_on_several_meshes():
    expected = float(WHOLE.norm()) * len(LAYOUTS) ** 0.5
    for degrees in ({"dp_replicate": 2, "dp_shard": 2}, {"dp_shard": 2, "tp": 2}):
        for norm, count, clipped in on_ranks(4, _norm, degrees):
            assert norm == pytest.approx(expected, rel=1e-14)
            assert count == 1
            assert clipped == pytest.approx(1, rel=1e-6)


def _norm(degrees):
    mesh = Mesh(Degrees(degrees), dist.get_rank())
    params = [_param(mesh, axes, placements) for axes, placements in LAYOUTS]
    with CommDebugMode() as mode:
        norm = float(total_norm(params, mesh))
    clip(params, 1.0, mesh)
    return norm, mode.get_total_counts(), float(total_norm(params, mesh))


def _param(mesh, axes, placements):
    param = torch.nn.Parameter(WHOLE.clone())
    if axes:
        param = torch.nn.Parameter(distribute_tensor(param.detach(), mesh.along(*axes), placements))
    param.grad = param.detach().clone()
    return param


def test_of_pipeline_stages():
    for norm in on_ranks(2, _of_stages):
        assert norm == pytest.approx((2 * 9 + 3 * 25) ** 0.5, rel=1e-7)


def _of_stages():
    """Return the norm where stages hold different parameters, some of them without a gradient."""
    mesh = Mesh(Degrees({"pp": 2}), dist.get_rank())
    held = [torch.nn.Parameter(torch.full((2 + mesh.rank,), 3.0 + 2 * mesh.rank)) for _ in range(2)]
    held[0].grad = held[0].detach().clone()
    return float(total_norm(held, mesh))
