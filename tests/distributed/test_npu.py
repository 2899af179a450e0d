"""What cvx asks of torch_npu, with a stand-in for it; nothing here has run on Ascend hardware."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cvx_core import CvxError, device
from cvx_core.joining import joined
from cvx_core.recipe import load
from cvx_core.spec import resolve
from cvx_core.world import World
from tests.distributed.harness import on_ranks
from tests.distributed.test_launch import DDP, free_port
from tests.distributed.test_train import RECIPE

STANDINS = str(Path(__file__).parents[1] / "standins")


def on_npu() -> dict[str, object]:
    """Return what the device table gives for an NPU."""
    sys.path.insert(0, STANDINS)
    before = "torch_npu" in sys.modules, hasattr(torch, "npu")
    place = device.pick("npu", local_rank=1)
    import torch_npu

    with pytest.raises(CvxError) as many:
        device.pick("npu", local_rank=2)
    device.synchronize(place)
    return {
        "before": before,
        "place": str(place),
        "many": str(many.value),
        "dtype": device.dtype("auto", place, "bfloat16"),
        "peak": device.peak_memory(place),
        "name": device.name(place),
        "calls": torch_npu.calls,
    }


def test_the_package_is_imported_first_and_asked_for_all_that_the_table_gives():
    (got,) = on_ranks(1, on_npu)
    assert got == {
        "before": (False, False),
        "place": "npu:1",
        "many": "this is process 3 on a host with 2 npu devices. Start at most 2 here "
        "(torchrun --nproc-per-node 2).",
        "dtype": torch.bfloat16,
        "peak": 12_345,
        "name": "Ascend stand-in",
        "calls": [(name, "npu:1") for name in ("synchronize", "max_memory_allocated", "get_device_name")],
    }


def joined_on_npu(recipe: str, port: int) -> tuple[object, ...]:
    """Join the other rank, each on its NPU; return what was asked of torch and when, and a sum over ranks."""
    sys.path.insert(0, STANDINS)
    dist.destroy_process_group()  # the harness's
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    world, asked = World.stated(), []
    spec = resolve(load(recipe, [DDP, "device=npu", "timeout_s=60"]), world=2)
    place = device.pick(spec.run.device, world.local_rank)
    import torch_npu

    init = dist.init_process_group

    def noted(backend: str, **rest: object) -> None:
        asked.append((backend, list(torch_npu.calls)))
        init(backend, **rest)

    dist.init_process_group = noted
    total = torch.ones(1)
    with joined(world, spec, place):
        dist.all_reduce(total)  # of what lies on the host
    return asked, torch_npu.groups, total.item()


def test_ranks_set_their_device_and_form_a_group_of_hccl_next_to_gloo(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    for rank, (asked, groups, total) in enumerate(on_ranks(2, joined_on_npu, str(path), free_port())):
        assert asked == [("cpu:gloo,npu:hccl", [("set_device", f"npu:{rank}")])]
        assert groups == [(rank, 2)]
        assert total == 2
