"""Optimizer state shared out among ranks that hold the same parameters.

Each of them updates some rows of every parameter, with whatever optimizer, and sends them to the others.
Names and shapes in `state_dict` are those of whole parameters, so that any other layout can go on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cvx_core.errors import CvxError
from cvx_core.interfaces import ParamGroup
from cvx_core.mesh import Mesh
from cvx_parallel.gradients import BUCKET
from cvx_parallel.layouts import Layouts, is_part
from cvx_parallel.optimizer_state import load_exactly

Make = Callable[[Sequence[ParamGroup]], torch.optim.Optimizer]


def sliced(make: Make, mesh: Mesh) -> Make:
    """Return what makes an optimizer whose state is shared out among the ranks that hold the same."""
    return lambda groups: Sliced(groups, make, mesh)


@dataclass(frozen=True, eq=False)
class Slice:
    """This rank's rows of what it holds of a parameter.

    rows: stands for them in the inner optimizer; starts: first row of each rank along `axis`, then the end.
    """

    name: str
    param: Tensor
    rows: nn.Parameter
    axis: str
    starts: Sequence[int]
    place: int

    def of(self, held: Tensor, place: int | None = None) -> Tensor:
        """Return the rows of one rank, this one if none is named, as a view."""
        place = self.place if place is None else place
        return held.narrow(0, self.starts[place], self.starts[place + 1] - self.starts[place])

    def gradient(self) -> Tensor | None:
        """Return this rank's rows of the parameter's gradient, which may be all that there is of it here."""
        gradient = self.param.grad
        if gradient is None:
            return None
        return held(gradient) if is_part(gradient, self.axis) else self.of(held(gradient))


class Sliced(torch.optim.Optimizer):
    """An optimizer of parameters that other ranks hold too; inside, one of this rank's rows of them.

    Parameters that are sharded along `fsdp` are shared out along dp_replicate, others along `loss`. `step`
    sends all parameters once along these axes, in broadcasts of up to BUCKET bytes.
    """

    def __init__(self, groups: Sequence[ParamGroup], make: Make, mesh: Mesh):
        self._mesh = mesh
        self._slices = [slice_of(name, param, mesh) for group in groups for name, param in group.params]
        by_name = {part.name: part for part in self._slices}
        self._inner = make(
            [
                ParamGroup([(name, by_name[name].rows) for name, _ in group.params], group.options)
                for group in groups
            ]
        )
        self._by_rows = {part.rows: part for part in self._slices}
        outer = [
            {**group, "params": [self._by_rows[rows].param for rows in group["params"]]}
            for group in self._inner.param_groups
        ]
        self._layouts = Layouts(mesh)
        super().__init__(outer, self._inner.defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update this rank's rows, then exchange them. Raises CvxError for state that rows cannot divide."""
        loss = closure() if closure is not None else None
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update({key: value for key, value in group.items() if key != "params"})
        for part in self._slices:
            part.rows.data = part.of(held(part.param))  # the memory may be another one since the last step
            part.rows.grad = part.gradient()
            if part.param in self.state:
                self._inner.state[part.rows] = self.state[part.param]
        self._inner.step()
        for part in self._slices:
            part.rows.grad = None
            if part.rows in self._inner.state:
                self.state[part.param] = self._checked(part)
        self._exchange()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state with every tensor as a part of the whole parameter's, as a DTensor."""
        packed: dict[str, Any] = super().state_dict()
        for part, values in self._stated(packed["state"]):
            values.update({key: self._whole(part, value) for key, value in values.items()})
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state that `state_dict` returned."""
        packed = {**state_dict, "state": {key: dict(values) for key, values in state_dict["state"].items()}}
        for values in packed["state"].values():
            values.update({key: held(v) for key, v in values.items() if isinstance(v, Tensor)})
        load_exactly(self, packed)

    def _stated(self, state: dict[Any, Any]) -> Iterator[tuple[Slice, dict[str, Any]]]:
        """Yield each slice with a copy of its state, put in place of the state itself."""
        by_param = {part.param: part for part in self._slices}
        params = [param for group in self.param_groups for param in group["params"]]
        for number in list(state):
            state[number] = dict(state[number])
            yield by_param[params[number]], state[number]

    def _whole(self, part: Slice, value: Any) -> Any:
        has_rows = isinstance(value, Tensor) and value.ndim
        return self._layouts.part(part.param, part.axis, value) if has_rows else value

    def _checked(self, part: Slice) -> dict[str, Any]:
        state: dict[str, Any] = self._inner.state[part.rows]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and not _goes_by_rows(value, part.rows):
                raise CvxError(
                    f"the optimizer keeps {key!r} of shape {list(value.shape)} for {list(part.rows.shape)} "
                    f"rows of {part.name!r}, which cannot be shared out by rows. Use zero3, or adamw."
                )
        return state

    def _exchange(self) -> None:
        """Send this rank's rows to those that hold the same parameters, and take theirs."""
        for axis in dict.fromkeys(part.axis for part in self._slices):
            if (group := self._mesh.group(axis)) is not None:
                for bucket in _buckets([part for part in self._slices if part.axis == axis]):
                    _broadcast(bucket, group, self._mesh.size(axis))


def _goes_by_rows(value: Tensor, rows: Tensor) -> bool:
    return value.ndim >= min(rows.ndim, 2) and value.shape[0] == rows.shape[0]


def _broadcast(bucket: Sequence[Slice], group: dist.ProcessGroup, size: int) -> None:
    """Send a bucket's rows of every rank to all; these are collectives that uneven rows do not pad."""
    sent = []
    for owner in range(size):
        views = [part.of(held(part.param), owner) for part in bucket]
        flat = torch.cat([view.reshape(-1) for view in views])
        sent.append((views, flat, dist.broadcast(flat, group_src=owner, group=group, async_op=True)))
    for owner, (views, flat, work) in enumerate(sent):
        work.wait()
        if owner != bucket[0].place:
            for view, part in zip(views, flat.split([view.numel() for view in views]), strict=True):
                view.copy_(part.view_as(view))


def _buckets(slices: Sequence[Slice]) -> Iterator[list[Slice]]:
    """Yield slices of one dtype, together up to BUCKET bytes of parameters or one slice."""
    by_dtype: dict[torch.dtype, list[Slice]] = {}
    for part in slices:
        by_dtype.setdefault(part.param.dtype, []).append(part)
    for parts in by_dtype.values():
        bucket, size = [], 0
        for part in parts:
            bucket.append(part)
            size += held(part.param).numel() * part.param.element_size()
            if size >= BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


def slice_of(name: str, param: Tensor, mesh: Mesh) -> Slice:
    """Return this rank's rows of a parameter; they are shared out as torch.chunk does."""
    names = param.device_mesh.mesh_dim_names or () if isinstance(param, DTensor) else ()
    axis = "loss" if {"fsdp", "dp_replicate"}.isdisjoint(names) else "dp_replicate"
    size, place, mine = mesh.size(axis), mesh.place(axis), held(param)
    step = -(-mine.shape[0] // size)
    starts = [min(step * number, mine.shape[0]) for number in range(size + 1)]
    rows = nn.Parameter(mine.narrow(0, starts[place], starts[place + 1] - starts[place]))
    return Slice(name, param, rows, axis, starts, place)


def held(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, without history."""
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of state that this rank keeps, single numbers aside."""
    states: Sequence[Mapping[str, Any]] = list(optimizer.state.values())
    tensors = [held(v) for state in states for v in state.values() if isinstance(v, Tensor) and v.ndim]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
