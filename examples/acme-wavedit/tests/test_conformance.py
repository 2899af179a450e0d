"""The author's whole test file."""

from cvx_core.testing import names, plugin, predictor

test_all = (
    plugin.suite("acme")
    + predictor.suite("acme-wavedit", latent_channels=4, text_dim=32)
    + names.suite("acme-wavedit:acme-pack", predictor="acme-wavedit")
)
