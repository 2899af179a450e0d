"""Our own strategies pass the kit that third parties run on theirs."""

import pytest

from cvx_core.testing import strategy

TP = ({"use": "tp", "size": 2},)

test_ours = (
    strategy.suite("zero3", size=2)
    + strategy.suite("tp", size=2, sequence=True)
    + strategy.suite("cp", ring=2)
    + strategy.suite("pp", size=2)
    + strategy.suite("layerzero", zero3_size=2, ignored_modules=("patch_embed",))
    + strategy.suite("interleave", world=1, rounds=2)
    + strategy.suite("recompute", world=1)
)
test_ours.pytestmark.append(pytest.mark.slow.mark)

# These differ little from those above, or are compared with one process elsewhere.
test_the_rest = (
    strategy.suite("ddp", size=2)
    + strategy.suite("zero1")
    + strategy.suite("zero2")
    + strategy.suite("encoder-dp", beside=TP)
    + strategy.suite("vae-cp", beside=TP)
    + strategy.suite("compile", world=1, backend="aot_eager")
)
test_the_rest.pytestmark.append(pytest.mark.matrix.mark)
