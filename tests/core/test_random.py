"""Draws depend on their key alone, however they are made."""

import pytest
import torch

from cvx_core.random import Draws, keyed, keyed_seed

DRAWS = Draws(7, 3, (0, 2, 5))


def test_a_key_gives_the_same_numbers_for_ever():
    assert keyed_seed(0, "noise", 1, 2) == keyed(0, "noise", 1, 2).initial_seed() == 58560272958171503


@pytest.mark.parametrize("shape", [(), (2,), (3, 5), (16,), (8, 3, 6, 7)])
def test_rows_drawn_together_are_those_drawn_one_by_one(shape):
    alone = [torch.randn(shape, generator=generator) for generator in DRAWS.of("noise")]
    assert torch.equal(DRAWS.normal("noise", shape), torch.stack(alone))
    alone = [torch.rand(shape, generator=generator) for generator in DRAWS.of("noise")]
    assert torch.equal(DRAWS.uniform("noise", shape), torch.stack(alone))


def test_one_generator_after_the_other_is_a_generator_for_each_row():
    apart = [torch.randint(1000, (2,), generator=generator) for generator in DRAWS.of("timestep")]
    reused = [torch.randint(1000, (2,), generator=generator) for generator in DRAWS.each("timestep")]
    assert all(map(torch.equal, apart, reused))
