"""What the transformer's config promises, what its model refuses, and how it starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from cvx_core import FormatError
from cvx_core.interfaces import Condition
from cvx_core.placing import initialise
from cvx_plugins.cogvideox.model import CogVideoX
from cvx_plugins.cogvideox.predictor_config import CogVideoXConfig
from cvx_plugins.cogvideox.presets import PRESETS

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 2,
    "head_dim": 16,
    "latent_channels": 4,
    "text_dim": 8,
    "text_length": 5,
    "temb_dim": 16,
}
LEARNED: dict[str, Any] = {
    "positions": "rotary+learned",
    "sample_height": 4,
    "sample_width": 6,
    "sample_frames": 9,
}


def model(**fields: Any) -> CogVideoX:
    made = CogVideoX(CogVideoXConfig(**SMALL, **fields))
    initialise(made, 0)
    return made


def inputs(
    size: tuple[int, int, int], length: int = 5, image: bool = False
) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, 4, *size, generator=generator)
    text = torch.randn(1, length, 8, generator=generator)
    mask = torch.ones(1, length, dtype=torch.bool)
    return latent, torch.tensor([500]), Condition(text, mask, latent.flip(2) if image else None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 24}, "head_dim is 24; rotary positions need a multiple of 16"),
        (
            {"head_dim": 4, "num_heads": 3, "positions": "sincos"},
            "is 12; positions: sincos needs a multiple of 16",
        ),
        ({"ofs_dim": 8}, "ofs_dim is 8; it must be even and equal temb_dim, 512"),
        ({"patch_t": 2, "positions": "sincos"}, "with patch_t: 2 only rotary is defined"),
        ({"positions": "absolute"}, "'rotary', 'sincos' or 'rotary\\+learned'"),
        ({"num_layer": 2}, "num_layer"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CogVideoXConfig(**fields)


def test_the_card_follows_the_fields_unless_it_is_overridden() -> None:
    rules = CogVideoXConfig(**SMALL, patch_t=2, image_condition=True, card={"frames_step": 16}).rules()
    assert (rules.size_step, rules.patch_t, rules.frames_step) == (16, 2, 16)
    assert (rules.latent_channels, rules.text_dim, rules.text_length) == (4, 8, 5)
    assert rules.image_latent == "divided"
    learned = CogVideoXConfig(**SMALL, **LEARNED, card={"latent_channels": 8}).rules()
    assert (learned.sizes, learned.frames_max, learned.image_latent) == (((32, 48),), 9, "none")
    assert learned.latent_channels == 8


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("cogvideox-2b", (8, 49, None, 8, "float16", 1.15258426, "none", 3.0, 226, 1)),
        ("cogvideox-5b", (8, 49, None, 8, "bfloat16", 0.7, "none", 1.0, 226, 1)),
        ("cogvideox-5b-i2v", (8, 49, ((480, 720),), 8, "bfloat16", 0.7, "scaled", 1.0, 226, 1)),
        ("cogvideox-1.5-5b", (16, 161, None, 16, "bfloat16", 0.7, "none", 1.0, 224, 2)),
        ("cogvideox-1.5-5b-i2v", (16, 161, None, 16, "bfloat16", 0.7, "divided", 1.0, 224, 2)),
    ],
)
def test_the_cards_of_the_releases(preset: str, expected: tuple[Any, ...]) -> None:
    rules = CogVideoXConfig(**PRESETS[preset]).rules()
    found = (rules.frames_step, rules.frames_max, rules.sizes, rules.fps, rules.dtype, rules.latent_scale)
    assert (*found, rules.image_latent, rules.snr_shift, rules.text_length, rules.patch_t) == expected
    assert (rules.size_step, rules.text_dim, rules.latent_channels) == (16, 4096, 16)


def test_a_foreign_config_is_not_recognised() -> None:
    assert CogVideoXConfig.recognise({"_class_name": "AutoencoderKLCogVideoX"}) is None


def by_diffusers(config: CogVideoXConfig) -> dict[str, Any]:
    """Return config.json as diffusers itself would have written it."""
    return {key: value for key, value in config.describe().items() if key != "_cvx"}


def test_the_sample_grid_does_not_hide_a_release_where_it_only_bounds() -> None:
    config = CogVideoXConfig(**PRESETS["cogvideox-1.5-5b"])
    foreign = by_diffusers(config) | {"sample_height": 96, "sample_width": 170}
    assert CogVideoXConfig.recognise(foreign) == {"use": "cogvideox-1.5-5b", "out_norm_eps": 1e-5}


def test_another_size_is_the_bare_model_with_what_differs() -> None:
    fields = CogVideoXConfig.recognise(by_diffusers(CogVideoXConfig(**SMALL, **LEARNED)))
    assert fields == {"use": "cogvideox", **SMALL, **LEARNED, "rope_grid": "resize", "out_norm_eps": 1e-5}


def test_our_own_config_json_keeps_what_diffusers_has_no_key_for() -> None:
    config = CogVideoXConfig(**SMALL, **LEARNED, qk_norm_eps=1e-5, ofs=3.0)
    fields = dict(CogVideoXConfig.recognise(config.describe()) or {})
    assert fields.pop("use") == "cogvideox"
    assert CogVideoXConfig(**fields) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_fn": "gelu"}, "activation_fn is 'gelu', expected 'gelu-approximate'"),
        ({"in_channels": 20}, "in_channels is 20, expected 16 or 32"),
        ({"patch_bias": False}, "patch_bias is False, expected True"),
        (
            {"use_learned_positional_embeddings": True, "use_rotary_positional_embeddings": False},
            "expected False",
        ),
    ],
)
def test_a_model_that_is_not_cogvideox_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        CogVideoXConfig.recognise({**CogVideoXConfig().describe(), **change})


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        ({"patch_t": 2}, inputs((5, 4, 4)), r"5 frames, .* Put card.padding\(5\) = 1 frames in front"),
        ({}, inputs((5, 5, 4)), "latent is 5x4; height and width must be multiples of 2"),
        ({}, inputs((3, 4, 4), image=True), "got an image_latent, but the model has image_condition=False"),
        ({"image_condition": True}, inputs((3, 4, 4)), "got no image_latent"),
        (LEARNED, inputs((3, 6, 4)), "of up to 3 frames of 4x6 and 5 text tokens"),
        (LEARNED, inputs((4, 4, 6)), "got 4 frames"),
        (LEARNED, inputs((3, 4, 6), length=4), "and 4 text tokens"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(fields: dict[str, Any], given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**fields)(*given)


@pytest.mark.parametrize("length", [1, 9])
def test_a_text_of_another_length_fits_where_no_table_is_learned(length: int) -> None:
    assert model()(*inputs((3, 4, 6), length)).shape == (1, 4, 3, 4, 6)


def test_fewer_frames_use_the_first_rows_of_the_learned_table() -> None:
    predictor = model(**LEARNED)
    short = predictor(*inputs((2, 4, 6)))
    with torch.no_grad():
        predictor.patch_embed.pos_embedding[:, 5 + 2 * 6 :] = 100.0
    assert torch.equal(predictor(*inputs((2, 4, 6))), short)
    assert not torch.equal(predictor(*inputs((3, 4, 6)))[:, :, :2], short)


@pytest.mark.parametrize("positions", ["rotary", "sincos"])
def test_tables_made_while_sampling_serve_training(positions: str) -> None:
    predictor = model(positions=positions)
    with torch.inference_mode():
        predictor(*inputs((3, 4, 6)))
    predictor(*inputs((3, 4, 6))).square().mean().backward()
    assert predictor.proj_out.weight.grad is not None


def test_tables_of_many_sizes_are_not_kept() -> None:
    predictor = model()
    for rows in range(1, 2 * predictor.tables.KEPT):
        predictor(*inputs((1, 2 * rows, 2)))
    assert len(predictor.tables._made) <= predictor.tables.KEPT


@pytest.mark.parametrize("fields", [{}, LEARNED, {"image_condition": True, "ofs_dim": 16, "patch_t": 2}])
def test_an_untrained_model_predicts_little_and_every_parameter_learns(fields: dict[str, Any]) -> None:
    predictor = model(**fields)
    latent, timestep, cond = inputs((2, 4, 6), image=bool(fields.get("image_condition")))
    prediction = predictor(latent, timestep, cond)
    assert prediction.std() < 0.5 * latent.std()
    (prediction - latent).square().mean().backward()
    dead = [name for name, p in predictor.named_parameters() if not p.grad.any()]
    assert not dead


def test_a_narrower_shard_of_the_heads_needs_no_change_of_the_model() -> None:
    predictor = model()
    attention = predictor.blocks["0"].attn1
    for name in ("to_q", "to_k", "to_v"):
        layer = getattr(attention, name)
        layer.weight = torch.nn.Parameter(layer.weight[:16])
        layer.bias = torch.nn.Parameter(layer.bias[:16])
    q, *_ = attention.heads(torch.randn(1, 7, 32), None)
    assert q.shape == (1, 1, 7, 16)
