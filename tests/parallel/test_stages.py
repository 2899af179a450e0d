"""The order of work in a pipeline: complete, in step between ranks, and free of deadlock."""

from itertools import product

import pytest
import torch
from torch import nn

from cvx_parallel.pipeline import COMPLETE, accumulate, actions, split_backward

CASES = [
    (schedule, ranks, stages, count)
    for (schedule, stages), ranks, count in product(
        [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1), ("zero-bubble", 3)],
        [2, 3, 4],
        [1, 2, 3, 4, 8],
    )
    if schedule in ("gpipe", "1f1b") or count % max(1, count // ranks) == 0
]


@pytest.mark.parametrize(("schedule", "ranks", "per_rank", "count"), CASES)
def test_every_stage_sees_every_microbatch_once_each_way(schedule, ranks, per_rank, count):
    orders = actions(schedule, ranks, ranks * per_rank, count)
    for rank, order in enumerate(orders):
        expected = {(stage, m) for stage in range(rank, ranks * per_rank, ranks) for m in range(count)}
        for kinds in (("FORWARD",), COMPLETE):
            done = [action.place for action in order if action.kind in kinds]
            assert sorted(done) == sorted(expected)


@pytest.mark.parametrize(("schedule", "ranks", "per_rank", "count"), CASES)
def test_orders_can_be_carried_out_even_if_a_send_waits_for_its_receive(schedule, ranks, per_rank, count):
    left = [list(order) for order in actions(schedule, ranks, ranks * per_rank, count)]
    done = set()
    while any(left):
        before = sum(map(len, left))
        for rank in range(ranks):
            while left[rank] and possible(left[rank][0], left, ranks, done):
                action = left[rank].pop(0)
                done.add((action.kind, *action.place))
                if action.kind.startswith("SEND"):
                    step = 1 if action.kind == "SEND_F" else -1
                    peer = left[(action.stage + step) % ranks].pop(0)
                    done.add((peer.kind, *peer.place))
        assert sum(map(len, left)) < before, "nobody can go on"


def possible(action, left, ranks, done):
    """Tell whether an action has what it needs; a send needs its receiver to be there."""
    stage, m = action.place
    if action.kind.startswith("SEND"):
        step, kind = (1, "RECV_F") if action.kind == "SEND_F" else (-1, "RECV_B")
        queue = left[(stage + step) % ranks]
        return bool(queue) and (queue[0].kind, queue[0].place) == (kind, (stage + step, m))
    if action.kind.startswith("RECV"):
        return False
    if action.kind == "FORWARD":
        return stage == 0 or ("RECV_F", stage, m) in done
    return ("FORWARD", stage, m) in done


def test_one_in_turn_keeps_no_more_microbatches_than_stages_behind():
    for rank, order in enumerate(actions("1f1b", 4, 4, 9)):
        open_, most = 0, 0
        for action in order:
            open_ += {"FORWARD": 1, "FULL_BACKWARD": -1}.get(action.kind, 0)
            most = max(most, open_)
        assert most == 4 - rank


class Branching(nn.Module):
    """Weights that meet, a weight behind another one, one that is used twice, and one that is not used."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x, y):
        gain = self.norm.weight * (1 + self.two(y))
        return self.one(torch.nn.functional.layer_norm(self.one(x), (4,), gain[0], self.norm.bias)), gain


def test_split_backward_passes_leave_the_same_gradients_and_call_hooks_once():
    torch.manual_seed(0)
    whole, split = Branching().double(), Branching().double()
    split.load_state_dict(whole.state_dict())
    seeds = [torch.randn(3, 4).double(), torch.randn(1, 4).double()]
    given = [torch.randn(3, 4).double(), torch.randn(1, 4).double()]
    inputs = [[tensor.clone().requires_grad_() for tensor in given] for _ in range(2)]
    called = []
    for name, param in split.named_parameters():
        param.register_post_accumulate_grad_hook(lambda _, name=name: called.append(name))
    for _ in range(2):
        torch.autograd.backward(whole(*inputs[0]), seeds)
        weights = list(split.parameters())
        found, parts = split_backward.stage_backward_input(list(split(*inputs[1])), seeds, inputs[1], weights)
        assert called == []
        for grad, tensor in zip(found, inputs[0], strict=True):
            assert torch.allclose(grad, tensor.grad, rtol=1e-12)
            tensor.grad = None
        accumulate(weights, parts)
        assert sorted(called) == sorted(n for n, _ in split.named_parameters() if not n.startswith("idle"))
        called.clear()
    for (name, param), (_, other) in zip(split.named_parameters(), whole.named_parameters(), strict=True):
        assert (param.grad is None) == (other.grad is None) == name.startswith("idle")
        assert param.grad is None or torch.allclose(param.grad, other.grad, rtol=1e-12)
