"""Releases are recognised by shapes alone, small models by shapes and tables; what stays open is said."""

import json

import pytest
import torch

from cvx_core import Registry
from cvx_core.interfaces import TensorInfo, Tensors
from cvx_core.testing.format import as_tensors
from cvx_core.testing.names import parameter_shapes
from cvx_plugins.cogvideox import infer
from cvx_plugins.cogvideox.names import FREQUENCIES, POSITIONS

RELEASES = ("cogvideox-2b", "cogvideox-5b", "cogvideox-5b-i2v", "cogvideox-1.5-5b", "cogvideox-1.5-5b-i2v")
TINY = {"num_layers": 2, "num_heads": 2, "head_dim": 16, "latent_channels": 4, "text_dim": 24, "temb_dim": 16}
GRID = {"sample_height": 8, "sample_width": 12, "sample_frames": 9, "text_length": 5}


def config(name, **fields):
    component = Registry.discover().get("predictor", name)
    return component.config(**{**component.preset, **fields})


def weights(name, **fields):
    """Return a model's shapes with zeros behind them, and its computed tables as they are."""
    state = {key: torch.zeros(shape) for key, shape in parameter_shapes("predictor", name, fields).items()}
    return {**state, **{key: make() for key, make in config(name, **fields).computed().items()}}


@pytest.mark.parametrize("release", RELEASES)
def test_a_full_size_release_is_its_preset_and_leaves_nothing_open(release):
    shapes = parameter_shapes("predictor", release, {})
    index = {name: TensorInfo(shape, "bfloat16") for name, shape in shapes.items()}
    found = config("cogvideox").infer(Tensors(index, lambda name: pytest.fail(f"{name} was read")))
    assert found == ({"use": release}, {}, {})


@pytest.mark.parametrize("release", RELEASES)
def test_a_small_model_with_its_tables_is_known_up_to_its_sample_size(release):
    fields = {**TINY, **GRID, **({"ofs_dim": 16} if release == "cogvideox-1.5-5b-i2v" else {})}
    tensors = as_tensors(weights(release, **fields))
    found = config("cogvideox").infer(tensors)
    expected = config(release, **fields)
    assert found.unknown == {}
    decided = {name: value for name, value in found.fields.items() if name != "use"}
    assert {name: getattr(expected, name) for name in decided} == decided
    told = {"num_layers", "num_heads", "latent_channels", "image_condition", "positions", "patch_t"}
    assert told <= decided.keys()
    assert decided.keys().isdisjoint(found.assumed)


def test_half_precision_tables_tell_the_same():
    state = weights("cogvideox-2b", **TINY, **GRID)
    exact = config("cogvideox").infer(as_tensors(state))
    for dtype in (torch.float16, torch.bfloat16):
        half = as_tensors({name: tensor.to(dtype) for name, tensor in state.items()})
        assert config("cogvideox").infer(half) == exact
    assert exact.fields["spatial_interpolation_scale"] == 1.875


def test_a_learned_table_alone_leaves_the_grid_open():
    state = weights("cogvideox-5b-i2v", **TINY, **GRID)
    found = config("cogvideox").infer(as_tensors({k: v for k, v in state.items() if k not in FREQUENCIES}))
    assert found.unknown.keys() == GRID.keys()
    fields = {name: value for name, value in found.fields.items() if name != "use"}
    rows = parameter_shapes("predictor", "cogvideox", fields)[POSITIONS][1]
    assert rows == state[POSITIONS].shape[1], "the shape fits, so that the weights can be handed on"


def test_without_tables_fixed_and_rotary_positions_look_alike():
    state = weights("cogvideox-2b", **TINY, **GRID)
    del state[POSITIONS]
    assert config("cogvideox").infer(as_tensors(state)).unknown.keys() == {"positions"}


def test_other_models_are_not_recognised():
    state = weights("cogvideox-5b", **TINY)
    del state["patch_embed.text_proj.weight"]
    assert infer.predictor(as_tensors(state)) is None
    assert infer.autoencoder(as_tensors(state)) is None
    vae = {
        name: torch.zeros(shape)
        for name, shape in parameter_shapes("autoencoder", "cogvideox-vae", {}).items()
    }
    assert infer.predictor(as_tensors(vae)) is None


def test_an_autoencoder_is_known_up_to_its_scale_factor():
    component = Registry.discover().get("autoencoder", "cogvideox-vae")
    fields = {
        "base_channels": 16,
        "channel_multipliers": (1, 2, 1, 3),
        "blocks_per_level": 2,
        "latent_channels": 5,
    }
    shapes = parameter_shapes("autoencoder", "cogvideox-vae", fields)
    index = {name: TensorInfo(shape, "float32") for name, shape in shapes.items()}
    found = component.config.infer(Tensors(index, lambda name: pytest.fail(f"{name} was read")))
    assert fields.items() <= found.fields.items()
    assert found.assumed.keys() == {"scale_factor"}


def test_a_released_config_file_names_the_same_release(tmp_path):
    described = json.loads(json.dumps(config("cogvideox-1.5-5b-i2v").describe()))
    assert config("cogvideox").recognise(described)["use"] == "cogvideox-1.5-5b-i2v"
