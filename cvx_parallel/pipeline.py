"""A model cut into stages on different ranks, which pass microbatches on and their gradients back.

The order of work is that of torch's schedules. It is carried out here, for torch's own stages want every
microbatch of one shape, and learn the shapes by a forward and a backward pass of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import _backward as split_backward
from torch.distributed.pipelining import schedules

COMPLETE = ("FULL_BACKWARD", "BACKWARD_WEIGHT")
"""Actions that leave gradients of parameters."""
Place = tuple[int, int]
"""A stage and a microbatch."""


class Action(NamedTuple):
    """One thing a rank does. kind: FORWARD, FULL_BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, SEND_F, RECV_F,
    SEND_B or RECV_B.
    """

    kind: str
    stage: int
    microbatch: int

    @property
    def place(self) -> Place:
        """The stage and the microbatch."""
        return self.stage, self.microbatch


@dataclass(frozen=True)
class Cut:
    """Blocks of each stage by name. Stages go round the ranks: rank r of n has r, r + n, and so on."""

    stages: tuple[tuple[str, ...], ...]
    ranks: int

    def rank_of(self, stage: int) -> int:
        """Return the rank that has a stage."""
        return stage % self.ranks

    def of(self, rank: int) -> range:
        """Return the stages of a rank."""
        return range(rank, len(self.stages), self.ranks)

    @property
    def last(self) -> int:
        """The stage that computes the loss."""
        return len(self.stages) - 1


@lru_cache(maxsize=64)
def actions(schedule: str, ranks: int, stages: int, microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """Return what each rank does in turn; sends and receives of two ranks come in the same order on both.

    schedule: gpipe, 1f1b, interleaved or zero-bubble; the first two have one stage on a rank.
    """
    if schedule in ("gpipe", "1f1b"):
        orders = {rank: _in_turn(schedule, ranks, rank, microbatches) for rank in range(ranks)}
    else:
        orders = _in_rounds(schedule, ranks, stages, microbatches)
    lists = {rank: [action for action in order if action is not None] for rank, order in orders.items()}
    complete = schedules._add_send_recv(lists, lambda stage: stage % ranks, stages)
    return tuple(
        tuple(
            Action(a.computation_type.name, a.stage_index, int(a.microbatch_index or 0))
            for a in complete[rank]
        )
        for rank in range(ranks)
    )


def _in_turn(schedule: str, ranks: int, rank: int, microbatches: int) -> list[Any]:
    """Return forward passes until the first gradient can be there, then one of each in turn; with gpipe all
    forward passes first.
    """
    ahead = microbatches if schedule == "gpipe" else min(microbatches, ranks - 1 - rank)
    forward = [schedules._Action(rank, schedules.FORWARD, number) for number in range(microbatches)]
    backward = [schedules._Action(rank, schedules.FULL_BACKWARD, number) for number in range(microbatches)]
    turns = [action for pair in zip(forward[ahead:], backward, strict=False) for action in pair]
    return [*forward[:ahead], *turns, *backward[microbatches - ahead :]]


def _in_rounds(schedule: str, ranks: int, stages: int, microbatches: int) -> dict[int, list[Any]]:
    """Return what torch's schedules do; of the stages they only want to know how many there are."""
    stand_ins: list[Any] = [
        SimpleNamespace(num_stages=stages, group_size=ranks, group_rank=0, submod=nn.Identity())
        for _ in range(stages // ranks)
    ]
    name = "ScheduleInterleaved1F1B" if schedule == "interleaved" else "ScheduleInterleavedZeroBubble"
    orders: dict[int, list[Any]] = getattr(schedules, name)(stand_ins, microbatches).pipeline_order
    return orders


class Stages(Protocol):
    """The stages of this rank, as `run` needs them."""

    module: nn.Module

    def expects(self, stage: int, microbatch: int) -> Sequence[Tensor]:
        """Return tensors of the shapes and dtypes that reach a stage from the one before; their values are of
        no use.
        """
        ...

    def forward(self, stage: int, microbatch: int, arrived: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return what a stage passes on; the last one its share of the loss, alone."""
        ...

    def parameters(self, stage: int) -> Iterable[Tensor]:
        """Return the parameters that a stage uses, as they are during a pass."""
        ...


class Passing:
    """One pass of all microbatches over the stages of this rank, forward and backward.

    before: called before each backward pass that leaves gradients of parameters, with whether it is the last.
    Where FSDP shares parameters out, one that splits backward passes keeps them gathered until all is done.
    """

    def __init__(
        self,
        stages: Stages,
        group: dist.ProcessGroup,
        cut: Cut,
        device: torch.device,
        before: Callable[[bool], None],
    ):
        self._stages, self._cut, self._device, self._before = stages, cut, device, before
        self._group, self._peers = group, dist.get_process_group_ranks(group)
        self._shared: Any = stages.module if isinstance(stages.module, FSDPModule) else None
        self._sent: dict[Action, list[tuple[Any, Tensor]]] = {}
        self._awaited: dict[Action, tuple[list[Any], list[Tensor]]] = {}
        self._inputs: dict[Place, list[Tensor]] = {}
        self._outputs: dict[Place, list[Tensor]] = {}
        self._input_grads: dict[Place, list[Tensor]] = {}
        self._weight_parts: dict[Place, tuple[list[Tensor], list[Any]]] = {}
        self._losses: list[Tensor] = []

    def run(self, order: Sequence[Action]) -> Tensor | None:
        """Do everything in order; return the sum of the losses on the rank of the last stage."""
        steps = {
            "FORWARD": self._forward,
            "FULL_BACKWARD": self._backward,
            "BACKWARD_INPUT": self._backward_to_inputs,
            "BACKWARD_WEIGHT": self._backward_to_weights,
            "SEND_F": self._send_outputs,
            "SEND_B": self._send_gradients,
            "RECV_F": self._receive_inputs,
            "RECV_B": self._receive_gradients,
        }
        last, is_split = self._last_passes(order), any(action.kind == "BACKWARD_WEIGHT" for action in order)
        if is_split:
            self._announce(False, keep=True)
        for action in order:
            if action.kind in COMPLETE:
                self._announce(action in last, keep=is_split)
            steps[action.kind](action)
        if is_split and self._shared is not None:
            self._before(True)
            self._shared._get_fsdp_state()._root_post_backward_final_callback()
        for action in list(self._sent):
            self._arrived(action)
        return torch.stack(self._losses).sum() if self._losses else None

    def _last_passes(self, order: Sequence[Action]) -> set[Action]:
        """Return the passes after which gradients are exchanged: each stage's last. FSDP then takes all that
        have come together, so for it the last one of all.
        """
        passes = [action for action in order if action.kind in COMPLETE]
        return {passes[-1]} if self._shared is not None else set({a.stage: a for a in passes}.values())

    def _announce(self, is_last: bool, keep: bool) -> None:
        self._before(is_last)
        if keep and self._shared is not None:
            self._shared.set_reshard_after_forward(False)
            self._shared.set_reshard_after_backward(False)

    def _forward(self, action: Action) -> None:
        inputs = [tensor.requires_grad_() for tensor in self._received(action, "RECV_F")]
        outputs = list(self._stages.forward(action.stage, action.microbatch, inputs))
        # Split backward passes detach outputs in place, to free their history; views do not allow it.
        outputs = [output.clone() if output._is_view() else output for output in outputs]
        if action.stage == self._cut.last:
            self._losses.append(outputs[0].detach())
        self._inputs[action.place], self._outputs[action.place] = inputs, outputs

    def _backward(self, action: Action) -> None:
        inputs, outputs, grads = self._taken(action)
        if outputs:
            torch.autograd.backward(outputs, grads)
        self._input_grads[action.place] = _filled([tensor.grad for tensor in inputs], inputs)

    def _backward_to_inputs(self, action: Action) -> None:
        if action.stage == 0:  # nothing comes before it: its one pass is due when the weights' is
            return
        inputs, outputs, grads = self._taken(action)
        weights = [weight for weight in self._stages.parameters(action.stage) if weight.requires_grad]
        started = [
            torch.ones_like(out) if grad is None else grad for out, grad in zip(outputs, grads, strict=True)
        ]
        found, parts = split_backward.stage_backward_input(outputs, started, inputs, weights)  # type: ignore[arg-type]
        self._weight_parts[action.place] = weights, parts
        self._input_grads[action.place] = _filled(found, inputs)

    def _backward_to_weights(self, action: Action) -> None:
        if action.stage == 0:
            self._backward(action)
        else:
            accumulate(*self._weight_parts.pop(action.place))

    def _taken(self, action: Action) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        """Return inputs, and outputs that have a history, with their gradients; None stands for that of the
        loss.
        """
        inputs, outputs = self._inputs.pop(action.place), self._outputs.pop(action.place)
        grads: Sequence[Tensor | None] = self._received(action, "RECV_B") or [None] * len(outputs)
        # Outputs whose gradients are here have arrived. With gloo nothing tells before it is waited for.
        self._arrived(action._replace(kind="SEND_F"))
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
        return inputs, [out for out, _ in pairs], [grad for _, grad in pairs]

    def _send_outputs(self, action: Action) -> None:
        self._send(action, [tensor.detach() for tensor in self._outputs[action.place]], action.stage + 1)

    def _send_gradients(self, action: Action) -> None:
        self._send(action, self._input_grads.pop(action.place), action.stage - 1)

    def _receive_inputs(self, action: Action) -> None:
        self._receive(action, self._stages.expects(action.stage, action.microbatch), action.stage - 1)

    def _receive_gradients(self, action: Action) -> None:
        self._receive(action, self._outputs[action.place], action.stage + 1)

    def _send(self, action: Action, tensors: Sequence[Tensor], stage: int) -> None:
        peer = self._peers[self._cut.rank_of(stage)]
        self._sent = {
            earlier: pairs
            for earlier, pairs in self._sent.items()
            if not all(work.is_completed() for work, _ in pairs)
        }
        wholes = [tensor.contiguous() for tensor in tensors]
        self._sent[action] = [(dist.isend(whole, peer, group=self._group), whole) for whole in wholes]

    def _arrived(self, action: Action) -> None:
        """Let go of what an action sent, once it has arrived."""
        for work, _ in self._sent.pop(action, ()):
            work.wait()

    def _receive(self, action: Action, like: Sequence[Tensor], stage: int) -> None:
        peer = self._peers[self._cut.rank_of(stage)]
        buffers = [torch.empty(t.shape, dtype=t.dtype, device=self._device) for t in like]
        self._awaited[action] = ([dist.irecv(t, peer, group=self._group) for t in buffers], buffers)

    def _received(self, action: Action, kind: str) -> list[Tensor]:
        """Return what another rank sent for an action; nothing at either end of the pipeline."""
        works, buffers = self._awaited.pop(action._replace(kind=kind), ([], []))
        for work in works:
            work.wait()
        return buffers


def accumulate(weights: Sequence[Tensor], parts: Sequence[Mapping[str, Any]]) -> None:
    """Finish a backward pass that `stage_backward_input` of torch has left at the weights.

    The gradients arrive in one pass over the weights alone, so that hooks on them see what they always do.
    """
    numbers = {split_backward._get_grad_fn_or_grad_acc(weight): i for i, weight in enumerate(weights)}
    found: dict[int, Tensor] = {}
    # In the order of the weights, as on every other rank: there may be exchanges on the way to them.
    for part in sorted(parts, key=lambda part: min(numbers[node] for node in part["params"])):
        wanted = sorted(numbers[node] for node in part["params"])
        grads = _gradients_of(part, [weights[number] for number in wanted])
        found |= {number: grad for number, grad in zip(wanted, grads, strict=True) if grad is not None}
    if found:
        torch.autograd.backward([weights[number] for number in found], list(found.values()))


def _gradients_of(part: Mapping[str, Any], weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the gradients of weights, from those noted where their graph leaves that of the inputs."""
    edges, grads, hooks = [], [], []
    noted = list(zip(part["intermediates"], part["grads"], strict=True))
    for node, values in noted:
        kept = [(i, value) for i, value in enumerate(values) if value is not None]
        edges += [GradientEdge(node, i) for i, _ in kept]
        grads += [value for _, value in kept]
        if len(noted) > 1:  # one may lead to another, whose gradient is whole already
            hooks.append(node.register_prehook(lambda _grads, values=values: values))
    try:
        # What lies between two uses of a weight is gone through for it, and again for what it meets there.
        return torch.autograd.grad(edges, weights, grads, retain_graph=True, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()


def _filled(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if grad is None else grad for grad, t in zip(grads, like, strict=True)]
