"""What is sent in a step, counted on real ranks: exactly what the plan's formulas say, by kind and axis."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from cvx_core.building import build
from cvx_core.interfaces import ParamGroup
from cvx_core.mesh import AXES, JOINED, Degrees
from cvx_core.placing import place
from cvx_core.recipe import parse
from cvx_core.spec import resolve
from cvx_parallel.tensor import Replicated
from cvx_plugins.plan.exchange import exchanged
from cvx_plugins.plan.layout import Layout
from cvx_plugins.plan.passes import Passes, Sample
from tests.distributed import matrix
from tests.distributed.counting import Sent, counted, totals
from tests.distributed.harness import on_ranks

ROOT = Path(__file__).parents[2]
Totals = dict[tuple[str, tuple[int, ...]], int]


class Case(NamedTuple):
    """A variant under strategies. batches: of a step; autoencoder: its fields, if clips are encoded too."""

    variant: str
    parallel: list[dict[str, Any]]
    batches: int = 1
    dtype: str = "float32"
    layers: int = 2
    autoencoder: dict[str, Any] | None = None

    def recipe(self, world: int, task: dict[str, Any]) -> str:
        """Return a recipe in which all data ranks together read as many rows as in the matrix."""
        data = yaml.safe_load(matrix.recipe(self.variant, self.parallel, self.dtype, self.layers))
        data["task"] = task
        data["autoencoder"] |= self.autoencoder or {}
        plan = Layout(resolve(parse(yaml.safe_dump({**data, "task": {"use": "plan", "world": world}}))))
        data["loader"] = {"batch": matrix.ROWS // plan.size("batch")}
        return yaml.safe_dump(data)

    def train(self, world: int) -> str:
        return self.recipe(world, {"use": "train", "steps": 2, "accumulate": self.batches})

    def plan(self, world: int) -> str:
        return self.recipe(world, {"use": "plan", "world": world, "accumulate": self.batches})


def sent(text: str, batches: int, encodes: bool) -> Totals:
    """Return what this rank sends in the second step of a recipe; the first asks what is asked once."""
    spec = resolve(parse(text))
    parts = place(build(spec), spec)
    matrix.randomise(parts)
    parts.predictor.train()
    assert parts.make_optimizer is not None
    optimizer = parts.make_optimizer([ParamGroup(matrix._trainable(parts), {})])
    works = matrix._encoded(parts, spec) if encodes else (matrix._share(parts, spec, n) for n in count())
    for _ in range(2):
        with counted() as found:
            for number in range(batches):
                work = next(works)
                parts.before_update(number == batches - 1)
                parts.forward_backward(*work)
            parts.after_backward()
            optimizer.step()
            optimizer.zero_grad()
    return totals(found)


def sent_all(cases: list[tuple[str, int, bool]]) -> list[Totals]:
    return [sent(*case) for case in cases]


def passes_of(case: Case, world: int) -> Passes:
    spec = resolve(parse(case.plan(world)))
    return Passes(Layout(spec), Sample(spec))


def planned(case: Case, world: int) -> list[Totals]:
    """Return what the formulas say, by rank."""
    passes = passes_of(case, world)
    degrees = passes.layout.degrees

    return [
        totals(Sent(kind, size, along(axis, rank, degrees)) for kind, axis, size in exchanged(passes, rank))
        for rank in range(world)
    ]


def along(axis: str, rank: int, degrees: Degrees) -> tuple[int, ...]:
    """Return the ranks that lie along an axis with a rank."""
    axis = "model" if axis == "chunks" else axis
    rest = [name for name in AXES if name not in JOINED.get(axis, (axis,))]
    where = [[degrees.coordinate(other, name) for name in rest] for other in range(degrees.world)]
    return tuple(other for other, place_ in enumerate(where) if place_ == where[rank])


TP, SP, PP, ZERO3 = {"use": "tp"}, {"use": "tp", "sequence": True}, {"use": "pp"}, {"use": "zero3"}
ULYSSES, RING, AGAIN = {"use": "cp", "ulysses": 2}, {"use": "cp", "ring": 2}, {"use": "recompute"}
LAYERZERO = {"use": "layerzero", "zero3_size": 2}
CHUNKS = {"encode_chunk": 4}
WHOLE = {"encode": "whole"}
VAE = {"use": "vae-cp"}
TWO = {
    "ddp": Case("2b", [{"use": "ddp"}]),
    "zero1": Case("1.0-t2v", [{"use": "zero1"}]),
    "zero2": Case("1.5-i2v", [{"use": "zero2"}], batches=2),
    "zero3": Case("1.0-i2v", [ZERO3]),
    "zero3 in bfloat16": Case("1.0-t2v", [{**ZERO3, "reduce_dtype": "float32"}], 2, "bfloat16"),
    "tp": Case("1.0-i2v", [TP]),
    "tp, uneven heads": Case("1.0-t2v", [TP, AGAIN], batches=2),
    "sp": Case("1.0-t2v", [SP, AGAIN]),
    "ulysses": Case("1.5-t2v", [ULYSSES]),
    "ulysses, uneven heads": Case("1.0-t2v", [ULYSSES, AGAIN], dtype="bfloat16"),
    "ring": Case("1.0-t2v", [RING, {**AGAIN, "every": 2}], batches=2, layers=3),
    "ring, selective": Case("1.0-t2v", [RING, {**AGAIN, "mode": "selective"}]),
    "ulysses, selective": Case("1.0-t2v", [ULYSSES, {**AGAIN, "mode": "selective"}]),
    "ring in bfloat16": Case("1.0-i2v", [RING], dtype="bfloat16"),
    "pp": Case("1.0-i2v", [PP], layers=3),
    "gpipe": Case("1.5-i2v", [{**PP, "schedule": "gpipe", "microbatches": 3}], batches=2),
    "interleaved": Case("1.0-t2v", [{**PP, "schedule": "interleaved"}], layers=5),
    "zero-bubble": Case("2b", [{**PP, "schedule": "zero-bubble"}]),
    "tp x lora": Case("1.0-t2v", [TP, {"use": "lora", "rank": 3}]),
    "vae-cp": Case("1.0-i2v", [TP, VAE], layers=1, autoencoder=CHUNKS),
    "vae-cp in one pass": Case("1.0-t2v", [TP, VAE], layers=1, autoencoder=WHOLE),
}
FOUR = {
    "layerzero": Case("1.5-i2v", [{**LAYERZERO, "ignored_modules": ["patch_embed", "proj_out"]}], 2),
    "layerzero in bfloat16": Case("1.0-i2v", [{**LAYERZERO, "param_dtype": "bfloat16"}]),
    "cp hybrid": Case("1.0-t2v", [{"use": "cp", "ring": 2, "ulysses": 2}]),
    "tp x zero3": Case("1.0-t2v", [TP, ZERO3]),
    "sp x zero2": Case("1.0-i2v", [SP, {"use": "zero2"}]),
    "sp x pp": Case("1.0-t2v", [SP, PP]),
    "pp x zero3": Case("1.0-i2v", [{**PP, "microbatches": 2}, ZERO3], batches=2),
    "zero-bubble x zero3": Case("2b", [{**PP, "schedule": "zero-bubble"}, ZERO3], batches=2),
    "sp x pp x lora": Case("1.0-t2v", [SP, PP, {"use": "lora", "rank": 3}]),
    "layerzero x cp": Case("1.0-t2v", [LAYERZERO, ULYSSES]),
    "cp x tp": Case("1.0-t2v", [RING, TP]),
    "zero3 x lora": Case("1.0-t2v", [ZERO3, {"use": "lora", "rank": 2}]),
}


def every_kind() -> tuple[Totals, ...]:
    """Issue each kind once by each way there is: now, as functions, of DTensors, in a backward pass."""
    rank, group = dist.get_rank(), dist.group.WORLD
    x, two, other = torch.ones(4), [torch.ones(4), torch.ones(4)], 1 - rank
    whole = torch.ones(8)
    mesh = init_device_mesh("cpu", (2,))
    with counted() as now:
        dist.all_reduce(x)
        dist.all_gather(two, x)
        dist.all_gather_into_tensor(whole, x)
        dist.reduce_scatter_tensor(x, whole)
        dist.broadcast(x, 0)
        ops = [dist.P2POp(dist.isend, x, other), dist.P2POp(dist.irecv, two[0], other)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        # This rank keeps one of its three numbers, or two, as many as come from the other.
        dist.all_to_all_single(torch.empty(2 * (1 + rank)), torch.ones(3), [1 + rank] * 2, [1, 2])
    with counted() as functions:
        functional.wait_tensor(functional.all_reduce(x, "sum", group))
        functional.wait_tensor(functional.all_gather_tensor(x, 0, group))
        functional.wait_tensor(functional.reduce_scatter_tensor(whole, "sum", 0, group))
        DTensor.from_local(x, mesh, [Shard(0)]).full_tensor()
    leaf = torch.ones(1, 4, 8, requires_grad=True)
    out = Replicated(group).leave(Replicated(group).enter(leaf))
    with counted() as backward:
        out.sum().backward()
    return totals(now), totals(functions), totals(backward)


def test_what_is_issued_is_counted_once():
    both = (0, 1)
    for rank, (now, functions, backward) in enumerate(on_ranks(2, every_kind)):
        assert now == {
            ("all_reduce", both): 16,
            ("all_gather", both): 2 * 32,
            ("reduce_scatter", both): 32,
            ("broadcast", both): 16,
            ("send", both): 16,
            ("all_to_all", both): 8 if rank == 0 else 4,
        }
        assert functions == {
            ("all_reduce", both): 16,
            ("all_gather", both): 2 * 32,
            ("reduce_scatter", both): 32,
        }
        assert backward == {("all_reduce", both): 128}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "cases"), [(2, TWO), (4, FOUR)], ids=["2 ranks", "4 ranks"])
def test_counted_bytes_are_those_of_the_formulas(world, cases):
    runs = [(case.train(world), case.batches, case.autoencoder is not None) for case in cases.values()]
    by_rank = on_ranks(world, sent_all, runs)
    wrong = []
    for number, (name, case) in enumerate(cases.items()):
        for rank, expected in enumerate(planned(case, world)):
            got = {key: size for key, size in by_rank[rank][number].items() if len(key[1]) > 1}
            if got != expected:
                wrong.append(f"{name}, rank {rank}: counted {got}, planned {expected}")
    assert not wrong, "\n".join(wrong)


STATED = {
    ("ddp",): (2, TWO["ddp"]),
    ("zero1",): (2, TWO["zero1"]),
    ("zero2",): (2, TWO["zero2"]),
    ("zero3",): (2, TWO["zero3"]),
    ("layerzero",): (4, FOUR["layerzero"]),
    ("tp",): (2, TWO["tp, uneven heads"]),
    ("tp sequence",): (2, TWO["sp"]),
    ("cp", "cp ulysses"): (2, TWO["ulysses"]),
    ("cp", "cp ring"): (2, TWO["ring"]),
    ("pp",): (2, TWO["pp"]),
    ("tp", "vae-cp"): (2, TWO["vae-cp in one pass"]),
}
"""What the docs' table is divided into, and a case that has all of it and nothing else."""


def documented() -> set[tuple[str, str, str]]:
    """Return (strategy, collective, axis) of each row of the docs' table."""
    section = (ROOT / "docs/parallel.md").read_text().split("## What is sent\n")[1].split("\n## ")[0]
    lines = [line.replace("`", "") for line in section.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in lines]
    return {(strategy, kind, axis) for strategy, kind, axis in rows}


def test_the_docs_state_every_collective_and_axis():
    rows = documented()
    assert {strategy for strategy, _, _ in rows} == {name for names in STATED for name in names}
    for names, (world, case) in STATED.items():
        passes = passes_of(case, world)
        found = {(kind, axis) for rank in range(world) for kind, axis, _ in exchanged(passes, rank)}
        assert found == {(kind, axis) for strategy, kind, axis in rows if strategy in names}, names
