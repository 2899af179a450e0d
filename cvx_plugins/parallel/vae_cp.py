"""vae-cp: fills the slots of the autoencoder, its causal convolutions and its group norms."""

from __future__ import annotations

from typing import Any

from torch.distributed import ProcessGroup

from cvx_core.interfaces import Deps, Parts
from cvx_parallel.causal_conv import CausalConv3d
from cvx_parallel.chunks import Relay
from cvx_plugins.parallel.encoder_ranks import groups
from cvx_plugins.parallel.vae_cp_config import VaeCPConfig


class VaeCP:
    """Chunks of a clip in turns over ranks that see the same rows."""

    def __init__(self, config: VaeCPConfig, deps: Deps):
        assert deps.spec is not None
        self._spec = deps.spec

    def apply(self, parts: Parts) -> Parts:
        """Fill the slots. All ranks then make the same calls of the autoencoder, and each gets all of it."""
        _, group = groups(parts.mesh, self._spec)
        if group is not None:
            spread(parts.autoencoder, group)
        return parts


def spread(autoencoder: Any, group: ProcessGroup) -> None:
    """Have an autoencoder code every clip on all ranks of a group. Collective."""
    relay = Relay(group, lambda: next(autoencoder.parameters()))
    autoencoder.chunks, autoencoder.gather, autoencoder.cut = relay.chunks, relay.gather, relay.cut
    for module in autoencoder.modules():
        if isinstance(module, CausalConv3d) and module.frames:
            module.halo, module.keeps_tail = relay.halo_of(module), False
    for net in autoencoder.one_pass():
        for module in net.modules():
            if hasattr(module, "normalise"):
                module.normalise = relay.norm_of(module)
