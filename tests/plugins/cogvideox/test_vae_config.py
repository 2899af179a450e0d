"""The autoencoder's config: what it refuses, and its two-way translation to the Diffusers config."""

import json

import pytest
import torch
from pydantic import ValidationError

from cvx_core import FormatError
from cvx_core.registry import Registry


@pytest.fixture
def config():
    return Registry.discover().get("autoencoder", "cogvideox-vae").config


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"norm_groups": 24}, "does not divide"),
        ({"temporal_compression": 3}, "power of two"),
        ({"temporal_compression": 16}, "up to 8"),
        ({"tile": {"height": 100}}, "nearest: 96 or 104"),
        ({"tile": {"overlap": 1.0}}, "less than 1"),
        ({"decode": "split"}, "balanced"),
        ({"scale_factor": 0.0}, "greater than 0"),
        ({"channel_multipliers": ()}, "at least 1"),
    ],
)
def test_value_that_cannot_work_is_refused_on_construction(config, fields, says):
    with pytest.raises(ValidationError, match=says):
        config(**fields)


@pytest.mark.parametrize(
    ("base", "multipliers", "groups"), [(128, (1, 2), 32), (8, (1, 2), 8), (4, (3, 2), 4)]
)
def test_groups_default_to_what_divides_every_width(config, base, multipliers, groups):
    cfg = config(base_channels=base, channel_multipliers=multipliers, temporal_compression=2)
    assert cfg.groups == groups


@pytest.mark.parametrize("overlap", [0.2, (0.2, 0.2)])
def test_overlap_is_a_whole_number_of_latent_pixels(config, overlap):
    tile = config(tile={"height": 240, "width": 360, "overlap": overlap}).tile
    assert tile.in_latent(8) == ((30, 45), (6, 9))
    assert config(tile={"height": 64, "width": 72, "overlap": overlap}).tile.in_latent(8) == ((8, 9), (1, 1))


def test_default_config_describes_the_released_model(config):
    described = config(scale_factor=1.15258426).describe()
    diffusers = pytest.importorskip("diffusers", reason="the reference implementation")
    with torch.device("meta"):
        model = diffusers.AutoencoderKLCogVideoX.from_config(json.loads(json.dumps(described)))
    for key, value in model.config.items():
        if not key.startswith("_") and key in described:
            wanted = list(value) if isinstance(value, tuple) else value
            assert described[key] == wanted, key
    assert described["block_out_channels"] == [128, 256, 256, 512]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "base_channels": 32,
            "channel_multipliers": (1, 2, 1, 1),
            "blocks_per_level": 1,
            "latent_channels": 4,
        },
        {"base_channels": 4, "channel_multipliers": (3, 2), "temporal_compression": 2, "norm_groups": 2},
        {
            "invert_scale_latents": True,
            "scale_factor": 0.7,
            "encode": "whole",
            "decode_first_frame": "paired",
        },
    ],
)
def test_config_comes_back_from_its_description(config, fields):
    cfg = config(**fields)
    described = json.loads(json.dumps(cfg.describe()))
    recognised = dict(config.recognise(described))
    assert recognised.pop("use") == "cogvideox-vae"
    again = config(**recognised)
    assert again == cfg.model_copy(update={"norm_groups": cfg.groups})


def test_released_file_is_recognised(config, shared):
    foreign = json.loads((shared / "fixtures/sat/vae/hf/vae/config.json").read_text())
    recognised = dict(config.recognise(foreign))
    assert recognised.pop("use") == "cogvideox-vae"
    cfg = config(**recognised)
    assert (cfg.widths, cfg.latent_channels, cfg.blocks_per_level) == ((32, 64, 32, 32), 4, 1)
    assert (cfg.scale_factor, cfg.groups, cfg.compression) == (0.7, 32, (4, 8, 8))


def test_file_of_another_model_is_not_recognised(config):
    assert config.recognise({"_class_name": "AutoencoderKL"}) is None
    assert config.recognise({}) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_quant_conv", True), ("shift_factor", 0.1), ("act_fn", "relu"), ("norm_eps", 1e-5)],
)
def test_foreign_setting_without_an_equivalent_is_an_error(config, key, value):
    with pytest.raises(FormatError, match=key):
        config.recognise({"_class_name": "AutoencoderKLCogVideoX", key: value})


def test_epsilon_that_cannot_be_described_is_an_error(config):
    with pytest.raises(FormatError, match="norm_eps"):
        config(norm_eps=1e-5).describe()
