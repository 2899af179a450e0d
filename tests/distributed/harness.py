"""Several processes for tests: started as the conformance kit of strategies starts them."""

from cvx_core.testing.ranks import TIMEOUT_S, on_ranks

__all__ = ["TIMEOUT_S", "on_ranks"]
