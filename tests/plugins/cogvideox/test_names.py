"""The tables of other worlds are bijections on every release at full size, levels counted from both ends."""

import pytest

from cvx_core import Registry
from cvx_core.testing import names
from cvx_core.testing.format import as_tensors
from cvx_core.testing.names import numbered, parameter_shapes

RELEASES = ("cogvideox-2b", "cogvideox-5b", "cogvideox-5b-i2v", "cogvideox-1.5-5b", "cogvideox-1.5-5b-i2v")


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("table", ["cogvideox:sat", "cogvideox:megatron", "cogvideox:layerzero"])
def test_every_name_of_a_full_size_release_is_covered_once(release, table):
    rules = Registry.discover().get("names", table).load()
    state = as_tensors(numbered(parameter_shapes("predictor", release, {})))
    foreign = rules.write(state)
    back = rules.read(foreign)
    assert back.index == state.index
    assert back.dropped == {}
    made = [name for step in rules.plan_reverse(state.index).steps for name in step.sources]
    assert sorted(made) == sorted(state.index)


test_sat = names.suite("cogvideox:sat", predictor="cogvideox-1.5-5b-i2v", num_layers=3)
test_sat_learned = names.suite("cogvideox:sat", predictor="cogvideox-5b-i2v", num_layers=2)
test_megatron = names.suite("cogvideox:megatron", predictor="cogvideox-5b-i2v", num_layers=2)
test_layerzero = names.suite("cogvideox:layerzero", predictor="cogvideox-2b", num_layers=2)
test_vae = names.suite("cogvideox-vae:sat", autoencoder="cogvideox-vae")
test_vae_of_three_levels = names.suite(
    "cogvideox-vae:sat", autoencoder="cogvideox-vae", channel_multipliers=(1, 2, 2), blocks_per_level=1
)
