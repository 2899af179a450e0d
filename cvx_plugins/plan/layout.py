"""What each rank holds of a predictor's parameters, gradients and optimizer state; arithmetic on shapes.

Nothing is placed. The rules are those of the strategies: stages of whole blocks, tensor-parallel chunks of a
dim, FSDP's chunks of what that leaves along dim 0, and for zero1, zero2 and layerzero rows of what is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from cvx_core import precision
from cvx_core.interfaces import Deps, ParamGroup, Plan
from cvx_core.mesh import Degrees
from cvx_core.registry import Choice
from cvx_core.spec import DEFAULTS, Spec
from cvx_parallel.tensor import matching

Shape = tuple[int, ...]
SHARDED = ("zero3", "layerzero")
"""Strategies that share out parameters along `fsdp`."""
ROWS = ("zero1", "zero2", "layerzero")
"""Strategies whose optimizer works on rows of what is held."""
KNOWN = (
    *SHARDED,
    *ROWS,
    "ddp",
    "tp",
    "cp",
    "pp",
    "recompute",
    "compile",
    "encoder-dp",
    "vae-cp",
    "interleave",
)


@dataclass(frozen=True)
class Held:
    """What one rank holds of one parameter. rows: shape of what its optimizer updates; None where frozen."""

    shape: Shape
    rows: Shape | None
    bytes_each: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.bytes_each


class Layout:
    """A training recipe on a mesh: who holds what. Its world is that of the task."""

    def __init__(self, spec: Spec):
        self.spec, self.world = spec, int(spec.config("task").world)
        self.degrees: Degrees = spec.mesh(self.world)
        self.strategies: Mapping[str, Any] = {choice.name: choice.config for choice in spec.parallel}
        self.plan: Plan = spec.config("predictor").plan()
        self.dtype = dtype_of(spec)
        self.predictor, self.trainable = predictor_of(spec, self.dtype)
        self._tp_dims = tp_dims(self.predictor, self.plan) if self.size("tp") > 1 else {}

    def size(self, axis: str) -> int:
        """Return the ranks along an axis."""
        return self.degrees.size(axis)

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Shapes of all parameters, whole."""
        return {name: tuple(p.shape) for name, p in self.predictor.named_parameters()}

    @cached_property
    def blocks(self) -> list[str]:
        """Names of the blocks, in order."""
        return list(self.predictor.blocks)

    @cached_property
    def stages(self) -> list[list[str]]:
        """Names of the blocks of each stage; stages go round the ranks along pp."""
        if self.size("pp") == 1:
            return [self.blocks]
        bounds = self.strategies["pp"].bounds(len(self.blocks))
        return [self.blocks[first:end] for first, end in bounds]

    def stages_of(self, place: int) -> range:
        """Return the stages of a rank, by its place along pp."""
        return range(place, len(self.stages), self.size("pp"))

    def names(self, place: int) -> list[str]:
        """Return the parameters that ranks at a place along pp have a part of."""
        stages = self.stages_of(place)
        mine = {name for stage in stages for name in self.stages[stage]}
        first, last = 0 in stages, len(self.stages) - 1 in stages
        return [name for name in self.shapes if self._is_in(name, mine, first, last)]

    def _is_in(self, name: str, blocks: set[str], first: bool, last: bool) -> bool:
        if unit := self.unit(name):
            return unit in blocks
        of_head = any(name.startswith(f"{head}.") for head in self.plan.head)
        return last if of_head else first

    def unsharded(self, name: str, rank: int) -> Shape:
        """Return the shape of what a rank computes with: all that tp leaves of a parameter."""
        shape, dim = self.shapes[name], self._tp_dims.get(name)
        return shape if dim is None else chunk(shape, dim, self.size("tp"), self._place(rank, "tp"))

    def held(self, name: str, rank: int) -> Held:
        """Return what a rank holds of a parameter of its stage."""
        shape, is_sharded = self.unsharded(name, rank), self.is_sharded(name)
        if is_sharded:
            shape = chunk(shape, 0, self.size("fsdp"), self._place(rank, "fsdp"))
        rows = shape if name in self.trainable else None
        if rows is not None and any(use in self.strategies for use in ROWS):
            axis = "dp_replicate" if is_sharded else "loss"
            rows = chunk(rows, 0, self.size(axis), self._place(rank, axis))
        return Held(shape, rows, self.dtype.itemsize)

    def is_sharded(self, name: str) -> bool:
        """Tell whether a parameter is shared out along `fsdp`."""
        ignored = tuple(f"{m}." for m in getattr(self.strategies.get("layerzero"), "ignored_modules", ()))
        return any(use in self.strategies for use in SHARDED) and not name.startswith(ignored)

    def is_tp(self, name: str) -> bool:
        """Tell whether tp shares out a parameter."""
        return name in self._tp_dims

    def tp_dim(self, name: str) -> int:
        """Return the dim that tp shares out."""
        return self._tp_dims[name]

    def unit(self, name: str) -> str:
        """Return the block that a parameter is gathered with, "" for those outside."""
        inside = f"{self.plan.blocks}."
        return name.removeprefix(inside).split(".")[0] if name.startswith(inside) else ""

    def all_held(self, rank: int) -> Mapping[str, Held]:
        """Return what a rank holds, by parameter."""
        return {name: self.held(name, rank) for name in self.names(self._place(rank, "pp"))}

    def state_bytes(self, rank: int) -> tuple[int, int, int]:
        """Return the bytes of parameters, gradients and optimizer state, single numbers aside, of a rank."""
        held = self.all_held(rank).values()
        trained = [part for part in held if part.rows is not None]
        state = sum(self._optimizer_bytes(part.rows) for part in trained if part.rows is not None)
        gradients = [self.gradient_bytes(part) for part in trained]
        choice = self.spec.choices.get("optimizer")
        if choice is not None and getattr(choice.config, "offload", False) is True:
            gradients = [max(gradients, default=0)]  # there is one at a time
        return sum(part.bytes for part in held), sum(gradients), state

    def average_bytes(self, rank: int) -> int:
        """Return the bytes of a running average of what a rank holds and trains, at least in float32."""
        each = max(self.dtype.itemsize, 4)
        return sum(math.prod(p.shape) * each for p in self.all_held(rank).values() if p.rows is not None)

    def gradient_bytes(self, part: Held) -> int:
        """Return the bytes of a trained parameter's gradient that a rank keeps."""
        shape = part.rows if "zero2" in self.strategies and part.rows is not None else part.shape
        return math.prod(shape) * part.bytes_each

    def first_of(self, place: int) -> int:
        """Return the rank that has the most of a place along pp: the first along every other axis."""
        return next(
            rank
            for rank in range(self.world)
            if self._place(rank, "pp") == place and not any(self._place(rank, a) for a in ("loss", "tp"))
        )

    def _place(self, rank: int, axis: str) -> int:
        return self.degrees.coordinate(rank, axis)

    @cached_property
    def _optimizer_bytes(self) -> Callable[[Shape], int]:
        choice = self.spec.choices.get("optimizer") or _usual(self.spec)
        make = choice.build(Deps(self.spec))
        if getattr(choice.config, "offload", False):
            return lambda _shape: 0  # it lies in host memory
        return lru_cache(None)(lambda shape: state_of(make, shape, self.dtype))


def state_of(make: Any, shape: Shape, dtype: torch.dtype) -> int:
    """Return the bytes of state that an optimizer keeps for a parameter, single numbers aside."""
    if not math.prod(shape):
        return 0
    param = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
    param.grad = torch.empty_like(param)
    optimizer = make.build([ParamGroup([("weight", param)], {})])
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # makes the state and no more, which may depend on values
    optimizer.step()
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor) and value.ndim)


def _usual(spec: Spec) -> Choice:
    """Return the optimizer of a recipe that states none, as training would have it."""
    component = spec.registry.get("optimizer", DEFAULTS["optimizer"])
    assert component.config is not None
    return Choice(component, component.config())


def chunk(shape: Sequence[int], dim: int, count: int, place: int) -> Shape:
    """Return the shape of one of `count` chunks along a dim, as torch.chunk cuts: equal, the last less."""
    step = -(-shape[dim] // count)
    size = max(0, min(step, shape[dim] - place * step))
    return (*shape[:dim], size, *shape[dim + 1 :])


def tp_dims(predictor: nn.Module, plan: Plan) -> dict[str, int]:
    """Return {parameter: dim} of those that tp shares out."""
    columns, rows = matching(predictor, plan.column), matching(predictor, plan.row)
    found = {f"{name}.{part}": 0 for name in columns for part in ("weight", "bias", "lora_B.weight")}
    found |= {f"{name}.{part}": 1 for name in rows for part in ("weight", "lora_A.weight")}
    known = {name for name, _ in predictor.named_parameters()}
    return {name: dim for name, dim in found.items() if name in known}


def dtype_of(spec: Spec) -> torch.dtype:
    """Return the precision of the run; `auto` as on an accelerator, unless the recipe's device is the CPU."""
    name: str = spec.run.dtype
    if name == "auto":
        name = (precision.usual(spec) if spec.run.device != "cpu" else None) or "float32"
    result: torch.dtype = getattr(torch, name)
    return result


def predictor_of(spec: Spec, dtype: torch.dtype) -> tuple[Any, frozenset[str]]:
    """Return the recipe's predictor on meta, adapter included, and the names of what is trained."""
    predictor = module_of(spec, "predictor", dtype)
    if "adapter" in spec.choices:
        return predictor, frozenset(spec.choices["adapter"].build(Deps(spec)).apply(predictor))
    predictor.requires_grad_(True)
    return predictor, frozenset(name for name, _ in predictor.named_parameters())


def module_of(spec: Spec, section: str, dtype: torch.dtype) -> Any:
    """Return a section's module on meta, frozen."""
    with torch.device("meta"):
        module = spec.choices[section].build(Deps(spec))
    return module.to(dtype).requires_grad_(False)
