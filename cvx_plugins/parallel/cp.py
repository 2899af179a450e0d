"""cp: the video tokens of one clip over ring x ulysses ranks."""

from __future__ import annotations

from dataclasses import replace

from cvx_core.interfaces import Deps, Parts
from cvx_core.spec import Spec
from cvx_core.strategy import Stage
from cvx_parallel.averaging import Averaging
from cvx_parallel.ring import Ring
from cvx_parallel.tensor import matching
from cvx_parallel.tokens import Context, share_tokens
from cvx_parallel.ulysses import Attend, Ulysses
from cvx_plugins.parallel.cp_config import ContextConfig


class CP:
    """Fills `split`, `join` and every `attend`; averages gradients where no data strategy does."""

    def __init__(self, cfg: ContextConfig, spec: Spec):
        self.cfg, self.spec = cfg, spec

    def apply(self, parts: Parts) -> Parts:
        mesh, predictor = parts.mesh, parts.predictor
        group = mesh.group("cp")
        if group is None:
            return parts
        context = Context(group, mesh.size("ring"), mesh.size("ulysses"))
        share_tokens(predictor, context)
        ring, ulysses = mesh.group("ring"), mesh.group("ulysses")
        for name, module in matching(predictor, self.spec.config("predictor").plan().attend).items():
            inner: Attend = module.attend if ring is None else Ring(ring, context.of_ring, name)
            if ulysses is not None:
                inner = Ulysses(ulysses, context.of_ulysses, inner, name)
            module.attend = inner
        return self._averaging(parts)

    def _averaging(self, parts: Parts) -> Parts:
        has_data = any(choice.config.stage == Stage.SHARD for choice in self.spec.parallel)
        if parts.trained is None or has_data:
            return parts
        averaging, earlier = Averaging(parts.trained, parts.mesh.group("loss")), parts.before_update

        def before(is_last: bool) -> None:
            earlier(is_last)
            averaging.before(is_last)

        return replace(parts, before_update=before)


def cp(cfg: ContextConfig, deps: Deps) -> CP:
    """Build the strategy."""
    assert deps.spec is not None
    return CP(cfg, deps.spec)
