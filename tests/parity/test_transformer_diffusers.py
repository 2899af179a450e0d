"""The transformer against diffusers with the same random weights: predictions, gradients, names and
configs."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cvx_core import Registry
from cvx_core.interfaces import Condition

diffusers = pytest.importorskip("diffusers")

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 3,
    "head_dim": 32,
    "latent_channels": 4,
    "text_dim": 24,
    "text_length": 7,
    "temb_dim": 16,
    "sample_height": 10,
    "sample_width": 14,
    "sample_frames": 17,
    "out_norm_eps": 1e-5,
}
"""Five latent frames of 5x7 patches."""

SAME_SIZE, WIDER, TALLER = (5, 10, 14), (3, 6, 18), (4, 22, 10)
CASES = [
    ("cogvideox-2b", SAME_SIZE),
    ("cogvideox-2b", WIDER),
    ("cogvideox-5b", SAME_SIZE),
    ("cogvideox-5b", WIDER),
    ("cogvideox-5b", TALLER),
    ("cogvideox-5b", (1, 10, 10)),
    ("cogvideox-5b-i2v", SAME_SIZE),
    ("cogvideox-1.5-5b", (6, 10, 14)),
    ("cogvideox-1.5-5b", (2, 6, 10)),
    ("cogvideox-1.5-5b-i2v", (4, 10, 6)),
]
PRESETS = ("cogvideox-2b", "cogvideox-5b", "cogvideox-5b-i2v", "cogvideox-1.5-5b", "cogvideox-1.5-5b-i2v")


def config_of(preset: str, **fields: Any) -> Any:
    component = Registry.discover().get("predictor", preset)
    assert component.config is not None
    return component.config(**{**component.preset, **fields})


def small(preset: str) -> Any:
    fields = SMALL | ({"ofs_dim": SMALL["temb_dim"]} if preset == "cogvideox-1.5-5b-i2v" else {})
    return config_of(preset, **fields)


def build(config: Any) -> Any:
    return Registry.discover().get("predictor", "cogvideox").load()(config, None)


def pair(config: Any) -> tuple[Any, Any]:
    """Return our model and theirs with the same weights, none of them zero or one."""
    ours, theirs = build(config), diffusers.CogVideoXTransformer3DModel.from_config(config.describe())
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(value.shape, generator=generator)
        * (0.3 if value.ndim == 1 else value.shape[-1] ** -0.5)
        for name, value in ours.state_dict().items()
    }
    ours.load_state_dict(weights)
    theirs.load_state_dict(weights)
    return ours, theirs


def sample(config: Any, size: tuple[int, int, int], batch: int = 2) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config.latent_channels, *size)
    latent, image = (torch.randn(shape, generator=generator) for _ in range(2))
    text = torch.randn(batch, config.text_length, config.text_dim, generator=generator)
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    return (
        latent,
        torch.tensor([999, 3])[:batch],
        Condition(text, mask, image if config.image_condition else None),
    )


def predicted_by(theirs: Any, latent: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    """Call their model as their pipelines do."""
    image = () if cond.image_latent is None else (cond.image_latent,)
    output = theirs(
        torch.cat((latent, *image), dim=1).transpose(1, 2),
        cond.text_embeds,
        timestep,
        ofs=torch.full((1,), 2.0) if theirs.config.ofs_embed_dim else None,
        image_rotary_emb=tables(theirs, latent),
        return_dict=False,
    )[0]
    return output.transpose(1, 2)


def tables(theirs: Any, latent: Tensor) -> Any:
    if not theirs.config.use_rotary_positional_embeddings:
        return None
    frames, height, width = latent.shape[2:]
    pipeline = SimpleNamespace(vae_scale_factor_spatial=8, transformer=theirs)
    prepare = diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings
    return prepare(pipeline, 8 * height, 8 * width, frames, latent.device)


@pytest.mark.parametrize(("preset", "size"), CASES)
@torch.no_grad()
def test_predictions_agree(preset: str, size: tuple[int, int, int]) -> None:
    ours, theirs = pair(small(preset))
    inputs = sample(ours.cfg, size)
    torch.testing.assert_close(ours(*inputs), predicted_by(theirs, *inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", ["cogvideox-5b-i2v", "cogvideox-1.5-5b-i2v"])
def test_gradients_agree(preset: str) -> None:
    ours, theirs = pair(small(preset))
    inputs = sample(ours.cfg, (5, 10, 14) if ours.cfg.patch_t is None else (4, 10, 6))
    ours(*inputs).square().mean().backward()
    predicted_by(theirs, *inputs).square().mean().backward()
    # Their learned table is a buffer, so it has no gradient to compare.
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert {n for n, _ in ours.named_parameters()} - gradients.keys() <= {"patch_embed.pos_embedding"}
    for name, gradient in gradients.items():
        where = partial("{}: {}".format, name)
        torch.testing.assert_close(ours.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5, msg=where)


@pytest.mark.parametrize("preset", PRESETS)
def test_full_size_names_and_shapes_are_theirs(preset: str) -> None:
    config = config_of(preset)
    with torch.device("meta"):
        ours, theirs = build(config), diffusers.CogVideoXTransformer3DModel.from_config(config.describe())
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("preset", PRESETS)
def test_their_config_is_recognised_as_the_preset(preset: str) -> None:
    config = config_of(preset)
    described = {key: value for key, value in config.describe().items() if key != "_cvx"}
    with torch.device("meta"):
        theirs = diffusers.CogVideoXTransformer3DModel.from_config({**described, "num_layers": 1})
    foreign = {**theirs.config, "_class_name": type(theirs).__name__, "num_layers": config.num_layers}
    assert config.recognise(foreign) == {"use": preset, "out_norm_eps": 1e-5}


def test_every_key_of_their_config_is_written() -> None:
    with torch.device("meta"):
        theirs = diffusers.CogVideoXTransformer3DModel(num_layers=1)
    keys = {key for key in theirs.config if not key.startswith("_")}
    assert keys == {key for key in config_of("cogvideox").describe() if not key.startswith("_")}
