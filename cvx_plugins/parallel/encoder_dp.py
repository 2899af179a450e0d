"""encoder-dp: each rank encodes a share of the rows that all of a group see."""

from __future__ import annotations

from cvx_core.errors import CvxError
from cvx_core.interfaces import Deps, Parts
from cvx_parallel.rows import over_rows
from cvx_plugins.parallel.encoder_dp_config import EncoderDPConfig
from cvx_plugins.parallel.encoder_ranks import groups


class EncoderDP:
    """Moments and embeddings are exchanged before anything is drawn, so that no draw depends on the ranks."""

    def __init__(self, config: EncoderDPConfig, deps: Deps):
        assert deps.spec is not None
        self._spec = deps.spec

    def apply(self, parts: Parts) -> Parts:
        """Fill the slots of the encoder. Raises CvxError where the task has none."""
        encoder = parts.encoder
        if encoder is None:
            raise CvxError("encoder-dp: the task encodes no batches. Remove this strategy.")
        samples, _ = groups(parts.mesh, self._spec)
        if samples is not None:
            encoder.moments_of = over_rows(encoder.moments_of, samples)
        if (everyone := parts.mesh.group("model")) is not None:
            encoder.embeds_of = over_rows(encoder.embeds_of, everyone)
        return parts
