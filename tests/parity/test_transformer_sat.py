"""The transformer against recorded outputs of the original code: every variant, every case its config
lists."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cvx_core import Registry
from cvx_core.interfaces import Condition, Tokens

VARIANTS = ("t2v_2b", "t2v_5b", "i2v_5b", "t2v_1.5", "i2v_1.5")
CLOSE = {"rtol": 0, "atol": 5e-6}
POSITIONS = {("sincos3d", False): "sincos", ("rope3d", False): "rotary", ("rope3d", True): "rotary+learned"}


def recorded(folder: Path) -> SimpleNamespace:
    """Return a variant's config, tensors with channels before frames, weights and cases."""
    config = json.loads((folder / "config.json").read_text())
    tensors = {
        name: value.transpose(1, 2) if value.ndim == 5 else value
        for name, value in load_file(folder / "io.safetensors").items()
    }
    weights = load_file(folder / "hf/transformer/diffusion_pytorch_model.safetensors")
    cases = [*config["cases"], *config.get("crop_cases", [])]
    weights = {name: value.float() for name, value in weights.items()}
    return SimpleNamespace(config=config, tensors=tensors, weights=weights, cases=cases)


def built(record: SimpleNamespace, case: dict[str, Any]) -> Any:
    """Return our model of a variant; `ofs`, an input there, is a constant of the model here."""
    sat = record.config
    patch_t = sat["patch_size"][0] if sat["version"] == "1.5" else None
    component = Registry.discover().get("predictor", "cogvideox")
    assert component.config is not None
    config = component.config(
        num_layers=sat["num_layers"],
        num_heads=sat["num_attention_heads"],
        head_dim=sat["head_dim"],
        latent_channels=sat["out_channels"],
        image_condition=sat["in_channels"] == 2 * sat["out_channels"],
        text_dim=sat["text_hidden_size"],
        text_length=sat["text_length"],
        temb_dim=sat["time_embed_dim"],
        ofs_dim=sat["ofs_embed_dim"],
        ofs=case.get("ofs", [2.0])[0],
        patch=sat["patch_size"][1],
        patch_t=patch_t,
        positions=POSITIONS[sat["pos_embed"], sat["learnable_pos_embed"]],
        sample_height=sat["latent_height"],
        sample_width=sat["latent_width"],
        sample_frames=sat["num_frames"],
        temporal_compression=sat["time_compressed_rate"],
        spatial_interpolation_scale=sat["height_interpolation"],
        temporal_interpolation_scale=sat["time_interpolation"],
        norm_eps=sat["block_layernorm_eps"],
        qk_norm_eps=sat["qk_layernorm_eps"],
        out_norm_eps=sat["output_layernorm_eps"],
    )
    model = component.load()(config, None)
    model.load_state_dict(record.weights)
    return model


def inputs(record: SimpleNamespace, name: str) -> tuple[Tensor, Tensor, Condition]:
    tensors = record.tensors
    text = tensors[f"{name}.text"]
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    cond = Condition(text, mask, tensors.get(f"{name}.image_latent"))
    return tensors[f"{name}.latent"], tensors[f"{name}.timestep"], cond


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_predictions_are_the_recorded_ones(shared: Path, variant: str) -> None:
    record = recorded(shared / "fixtures/sat" / variant)
    for case in record.cases:
        name = case["name"]
        prediction = built(record, case)(*inputs(record, name))
        where = partial("{}: {}".format, name)
        torch.testing.assert_close(prediction, record.tensors[f"{name}.output"], **CLOSE, msg=where)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_tokens_are_the_recorded_ones_after_every_block(shared: Path, variant: str) -> None:
    record = recorded(shared / "fixtures/sat" / variant)
    case = next(case for case in record.cases if f"{case['name']}.tokens_in" in record.tensors)
    model, name = built(record, case), case["name"]
    tokens = model.embed(*inputs(record, name))
    torch.testing.assert_close(tokens.temb, record.tensors[f"{name}.emb"], **CLOSE)
    torch.testing.assert_close(sequence(tokens), record.tensors[f"{name}.tokens_in"], **CLOSE)
    for index, block in model.blocks.items():
        tokens = block(tokens)
        torch.testing.assert_close(sequence(tokens), record.tensors[f"{name}.block{index}"], **CLOSE)


def sequence(tokens: Tokens) -> Tensor:
    return torch.cat((tokens.text, tokens.video), dim=1)


@pytest.mark.parametrize(
    ("eps", "value"), [("norm_eps", 1e-6), ("qk_norm_eps", 1e-5), ("out_norm_eps", 1e-5)]
)
@torch.no_grad()
def test_a_wrong_epsilon_would_be_seen(shared: Path, eps: str, value: float) -> None:
    record = recorded(shared / "fixtures/sat/t2v_5b")
    theirs = {"norm_eps": "block", "qk_norm_eps": "qk", "out_norm_eps": "output"}[eps]
    record.config[f"{theirs}_layernorm_eps"] = value
    prediction = built(record, {})(*inputs(record, "case0"))
    assert (prediction - record.tensors["case0.output"]).abs().max() > CLOSE["atol"]
