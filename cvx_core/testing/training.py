"""What one rank of the strategy kit does: two updates by hand, then runs of the task with a resume between.

Everything goes through a recipe and the callables of Parts, as a task does it; nothing knows the strategy.
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cvx_core.building import build
from cvx_core.interfaces import Batch, ParamGroup, Parts, Row, Work
from cvx_core.placing import place
from cvx_core.random import Draws, keyed
from cvx_core.recipe import parse
from cvx_core.spec import Spec, resolve
from cvx_core.weights import copy_part

State = dict[str, Tensor]
UPDATES = 2


class Step(NamedTuple):
    """Two updates: the loss and gradients of the first, and the parameters after both; whole, on the CPU."""

    loss: float
    gradients: State
    parameters: State


class Run(NamedTuple):
    """A run of the task: its log, a record per step, and the parameters it ended with."""

    records: list[dict[str, Any]]
    parameters: State


@dataclass
class Seen:
    """What a rank has seen until it ended, or until something went wrong: then `error` is the traceback."""

    names: list[str] = field(default_factory=list)
    step: Step | None = None
    runs: list[Run] = field(default_factory=list)
    error: str = ""


def work(step: str, runs: Sequence[str], rows: int, names: Collection[str]) -> Seen:
    """Do all of it on this rank. Recipes: of the step, and of the runs, one after the other.

    rows: those of a batch over all data ranks; names: the parameters that there are without the strategy.
    With others there is nothing to compare, and all ranks stop.
    """
    seen = Seen()
    try:
        spec = resolve(parse(step))
        parts = place(build(spec), spec)
        seen.names = [name for name, _ in parts.trained.named_parameters()]
        if _all_names(seen.names) == set(names):
            seen.step = two_updates(parts, spec, rows)
            for text in runs:
                seen.runs.append(task_run(text))
    except Exception:
        seen.error = traceback.format_exc()
    return seen


def _all_names(names: list[str]) -> set[str]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, names)
    return set().union(*everyone)


def two_updates(parts: Parts, spec: Spec, rows: int) -> Step:
    """Update placed parts twice, on random parameters and clips, each rank with its share of the rows."""
    assert parts.forward_backward is not None
    assert parts.make_optimizer is not None
    assert parts.encode is not None
    randomise(parts)
    parts.trained.train()
    named = [(name, p) for name, p in parts.trained.named_parameters() if name in parts.trainable]
    optimizer = parts.make_optimizer([ParamGroup(named, {})])
    losses, gradients = [], {}
    for item in parts.encode(islice(_works(parts, spec, rows), UPDATES)):
        parts.before_update(True)
        losses.append(_mean(parts.forward_backward(item.features, item.draws), parts))
        parts.after_backward()
        if len(losses) == 1:
            gradients = {name: whole(p.grad) for name, p in named if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return Step(losses[0], gradients, _parameters(parts))


def task_run(text: str) -> Run:
    """Run a recipe's task; its log is that of the first rank, which writes it."""
    spec = resolve(parse(text))
    parts = place(build(spec), spec)
    parts.task.run(parts, spec)
    log = spec.output / "log.jsonl"
    records = log.read_text(encoding="utf-8").splitlines() if parts.mesh.is_first else []
    return Run([json.loads(record) for record in records], _parameters(parts))


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of all of a tensor, on the CPU. Collective over the mesh of a DTensor."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone().cpu()


def _parameters(parts: Parts) -> State:
    return {name: whole(p) for name, p in parts.trained.named_parameters()}


def randomise(parts: Parts) -> None:
    """Draw every parameter anew, so that no gate is closed, no bias zero and no norm the identity."""
    with torch.no_grad():
        for name, param in parts.trained.named_parameters():
            generator = keyed(1, "kit", name)
            value = torch.randn(tuple(param.shape), generator=generator, dtype=torch.float64)
            if param.ndim > 1:
                value *= 0.3 / math.sqrt(math.prod(param.shape[1:]))
            else:
                value = 0.1 * value + float(name.endswith("weight"))
            copy_part(param, value)


def _works(parts: Parts, spec: Spec, rows: int) -> Iterator[Work]:
    """Yield this rank's share of batches that do not depend on how many ranks there are."""
    rank, world, video = parts.mesh.place("batch"), parts.mesh.size("batch"), spec.video
    places = tuple(range(rank, rows, world))
    shape = (3, video.frames, video.height, video.width)
    for number in count():
        clips = [torch.rand(shape, generator=keyed(2, "kit", number, at)) * 2 - 1 for at in places]
        prompts = tuple(f"{number} {at}" for at in places)
        pixels = torch.stack(clips)
        batch = Batch(tuple(Row(name, (name,)) for name in prompts), prompts, pixels, pixels[:, :, 0])
        yield Work(None, batch, Draws(3, number, places, rank, world))


def _mean(loss: Tensor, parts: Parts) -> float:
    """Return the mean of a loss over the ranks that read different rows."""
    if (group := parts.mesh.group("batch")) is not None:
        dist.all_reduce(loss, group=group)
        loss = loss / parts.mesh.size("batch")
    return float(loss)
