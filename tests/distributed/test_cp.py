"""Context parallel: any split of a clip's tokens does what one process does."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from cvx_core.errors import CvxError
from cvx_core.interfaces import Tokens
from cvx_parallel.ring import Ring
from cvx_parallel.tokens import Context
from cvx_parallel.ulysses import Ulysses
from tests.distributed.harness import on_ranks
from tests.distributed.matrix import compare_all


def cp(ulysses=1, ring=1):
    return {"use": "cp", "ulysses": ulysses, "ring": ring}


ON_2 = [
    ("1.0-t2v", [cp(ulysses=2)]),
    ("1.5-i2v", [cp(ulysses=2)]),
    ("1.0-t2v", [cp(ring=2)]),
    ("1.5-i2v", [cp(ring=2)]),
    ("2b", [cp(ring=2), {"use": "recompute"}]),
    ("1.0-t2v", [cp(ulysses=2), {"use": "zero3"}]),
]
ON_3 = [("1.5-t2v", [cp(ulysses=3)]), ("1.0-i2v", [cp(ring=3)])]
ON_4 = [
    ("1.0-t2v", [cp(ulysses=2, ring=2)]),
    ("1.5-i2v", [cp(ulysses=4)]),  # three heads
]
ON_4_WITH_DATA = [
    ("1.0-t2v", [cp(ring=2), {"use": "zero3"}]),
    ("1.5-i2v", [cp(ulysses=2), {"use": "ddp"}]),
    ("1.5-i2v", [cp(ring=2), {"use": "zero2"}]),
]


@pytest.mark.parametrize(
    ("world", "cases"),
    [(2, ON_2), (3, ON_3), (4, ON_4), (4, ON_4_WITH_DATA)],
    ids=["2", "3", "4", "4-with-data"],
)
def test_any_split_is_one_process(world, cases):
    compare_all(cases, world, layers=2)


def test_attention_of_few_tokens_and_heads_and_without_text():
    on_ranks(4, _all_small_cases)


def _all_small_cases():
    for ring, ulysses in ((1, 4), (4, 1), (2, 2)):
        small = Small(ring, ulysses)
        for (text, video), heads in itertools.product([(4, 3), (0, 9), (0, 3), (2, 11)], [1, 3, 6]):
            _compare_attention(small, text, video, heads)


class Small:
    """An attention module on its own, over all ranks."""

    def __init__(self, ring, ulysses):
        mesh = init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
        self.context = Context(dist.group.WORLD, ring, ulysses)
        self.attend = F.scaled_dot_product_attention
        if ring > 1:
            self.attend = Ring(mesh.get_group("ring"), self.context.of_ring)
        if ulysses > 1:
            self.attend = Ulysses(mesh.get_group("ulysses"), self.context.of_ulysses, self.attend)

    def enter(self, text, video):
        """Let tokens enter a block."""
        tokens = Tokens(torch.empty(2, video, 1), torch.empty(2, text, 1), None, None, (1, 1, video))
        return self.context.watch(lambda body, tokens: body(tokens))(self.context.split, tokens)


def _compare_attention(small, text, video, heads):
    """Compare outputs, and gradients of a loss to which each rank adds an equal share of the text's part."""
    generator = torch.Generator().manual_seed(heads)
    q, k, v, weight = torch.randn(
        4, 2, heads, text + video, 8, dtype=torch.float64, generator=generator
    ).unbind()
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*inputs)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    rank, world = dist.get_rank(), dist.get_world_size()
    here = torch.arange(video).tensor_split(world)[rank] + text
    here = torch.cat((torch.arange(text), here))
    assert small.enter(text, video).video.shape[1] == len(here) - text
    local = [x[:, :, here].requires_grad_() for x in (q, k, v)]
    out = small.attend(*local, None)
    with torch.inference_mode():
        assert torch.equal(small.attend(*local, None), out)
    share = torch.where(here < text, 1 / world, 1.0).unsqueeze(-1)
    grads = torch.autograd.grad((out * weight[:, :, here] * share).sum(), local)
    torch.testing.assert_close(out, expected[:, :, here], rtol=0, atol=1e-12)
    for grad, whole in zip(grads, expected_grads, strict=True):
        words = grad[:, :, :text].contiguous()
        dist.all_reduce(words)
        torch.testing.assert_close(words, whole[:, :, :text], rtol=0, atol=1e-12)
        torch.testing.assert_close(grad[:, :, text:], whole[:, :, here[text:]], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (2, 1)], ids=["ulysses", "ring"])
def test_masks_and_other_tokens_are_refused(ring, ulysses):
    for masked, shorter in on_ranks(2, _refusals, ring, ulysses):
        assert "attention: got a mask [5, 5], but with `cp`" in masked
        assert "attention: got queries [1, 2, 5, 8] of 5 tokens where 6 entered" in shorter


def _refusals(ring, ulysses):
    small = Small(ring, ulysses)
    x, found = torch.zeros(1, 2, 5, 8), []
    for video, mask in ((6, torch.ones(5, 5, dtype=torch.bool)), (8, None)):
        small.enter(2, video)
        with pytest.raises(CvxError) as raised:
            small.attend(x, x, x, mask)
        found.append(str(raised.value))
    return found


def test_split_and_join_are_inverse_and_slice_rotary_tables():
    for rank, (rows, table, joined) in enumerate(on_ranks(3, _round_trip)):
        first, count = [(0, 3), (3, 2), (5, 2)][rank]
        assert rows == list(range(first, first + count))
        assert table == rows
        assert joined == list(range(7))


def _round_trip():
    context = Context(dist.group.WORLD, 1, 3)
    rows = torch.arange(7.0)
    rope = (rows[:, None], -rows[:, None])
    whole = Tokens(rows.view(1, 7, 1), torch.zeros(1, 2, 1), torch.zeros(1, 1), rope, (1, 1, 7))
    mine = context.split(whole)
    assert torch.equal(mine.rope[0], -mine.rope[1])
    return [x.flatten().tolist() for x in (mine.video, mine.rope[0], context.join(mine).video)]


def test_cp_over_one_rank_is_refused():
    from cvx_plugins.parallel.cp_config import ContextConfig

    spec = SimpleNamespace(choices={}, name_of=lambda _section: "precompute")
    messages = [problem.message for problem in ContextConfig().check(spec)]
    assert len(messages) == 2
    assert "1 x ring 1 shares out nothing" in messages[0]
    assert "task 'precompute' has none" in messages[1]
