"""diffusers loads what we write without a warning and computes the same; recipes load any format as it is."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from cvx_core.building import build
from cvx_core.interfaces import Condition
from cvx_core.placing import fill, place
from cvx_core.recipe import parse
from cvx_core.registry import Choice
from cvx_core.spec import resolve
from cvx_io.conversion.detect import find_format, recognise
from cvx_plugins.cogvideox.positions import own_coordinates, rope_table

VARIANTS = ("t2v_2b", "t2v_5b", "i2v_5b", "t2v_1.5", "i2v_1.5")
FORMATS = ("sat", "hf", "megatron", "dcp")


def silently(caplog, cls, folder):
    """Load a diffusers model; fail on any warning and on any key that is missing or too many."""
    logging.getLogger("diffusers").propagate = True
    diffusers.utils.logging.set_verbosity_warning()
    with caplog.at_level(logging.WARNING):
        model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    assert [record.getMessage() for record in caplog.records] == []
    return model.eval()


def first_case(folder: Path) -> SimpleNamespace:
    """Return the first recorded case: inputs in our order of dims, and the original's output."""
    io = {name.removeprefix("case0."): value for name, value in load_file(folder / "io.safetensors").items()}
    case = {
        name: value.transpose(1, 2) if value.ndim == 5 else value
        for name, value in io.items()
        if "." not in name
    }
    return SimpleNamespace(**{"image_latent": None, **case})


def opened(path, registry, convert_model=None):
    """Return a model with weights loaded by the code that recipes use, whatever the format of `path`."""
    component = find_format(path, registry)
    fmt = component.load()(component.config(), None)
    family = registry.get("predictor", "cogvideox").config.family
    model = recognise(fmt.open(path, registry.table(family, component)), registry)
    config = model.config.model_copy(update=convert_model or {})
    with torch.device("meta"):
        module = model.component.load()(config, None)
    module.to_empty(device="cpu")
    choice = Choice(model.component, config, Choice(component, component.config(path=path)))
    spec = SimpleNamespace(registry=registry, run=SimpleNamespace(seed=0))
    account = fill(module, choice, spec, "predictor")
    return module.eval(), account


def run(module, case):
    mask = torch.ones(case.text.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        return module(case.latent, case.timestep, Condition(case.text, mask, case.image_latent))


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_computes_what_we_do_from_converted_weights(
    variant, convert, registry, shared, tmp_path, caplog
):
    folder = shared / "fixtures/sat" / variant
    convert(folder / "transformer", tmp_path / "hf", "hf")
    theirs = silently(caplog, diffusers.CogVideoXTransformer3DModel, tmp_path / "hf")
    case = first_case(folder)
    case.timestep %= 200  # near 1000 the last bit of an exp(), rounded by processor, is worth 1e-5
    ours, _ = opened(tmp_path / "hf", registry, {"out_norm_eps": theirs.config.norm_eps})
    patch_t, patch = theirs.config.patch_size_t or 1, theirs.config.patch_size
    grid = (case.latent.shape[2] // patch_t, case.latent.shape[3] // patch, case.latent.shape[4] // patch)
    rope = None
    if theirs.config.use_rotary_positional_embeddings:
        cos, sin = rope_table(own_coordinates(grid), theirs.config.attention_head_dim)
        rope = (cos, sin * torch.tensor([-1.0, 1.0]).repeat(sin.shape[-1] // 2))
    parts = [case.latent] if case.image_latent is None else [case.latent, case.image_latent]
    with torch.no_grad():
        expected = theirs(
            torch.cat(parts, dim=1).transpose(1, 2),
            case.text,
            case.timestep,
            ofs=torch.tensor([2.0]) if theirs.config.ofs_embed_dim else None,
            image_rotary_emb=rope,
            return_dict=False,
        )[0].transpose(1, 2)
    torch.testing.assert_close(run(ours, case), expected, rtol=0, atol=1e-5)


def test_diffusers_decodes_what_we_do_from_a_converted_autoencoder(
    convert, registry, shared, tmp_path, caplog
):
    folder = shared / "fixtures/sat/vae"
    convert(folder / "3d-vae.pt", tmp_path / "vae", "hf", dtype="float32")
    theirs = silently(caplog, diffusers.AutoencoderKLCogVideoX, tmp_path / "vae")
    io = load_file(folder / "io.safetensors")
    with torch.no_grad():
        moments = theirs.encode(io["f9.video"]).latent_dist.parameters
    torch.testing.assert_close(moments, io["f9.moments"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_recipe_loads_any_format_to_the_original_output(variant, kind, convert, registry, shared, tmp_path):
    folder = shared / "fixtures/sat" / variant
    source = folder / "transformer"
    path = source
    if kind != "sat":
        layers = json.loads((folder / "config.json").read_text())["num_layers"]
        settings = {"pp": [1, layers - 1]} if kind == "megatron" else {}
        path = tmp_path / "weights"
        convert(source, path, kind, settings=settings)
    known = opened(source, registry)[0].cfg
    case = first_case(folder)
    module, account = opened(path, registry, known.model_dump(exclude={"card"}))
    torch.testing.assert_close(run(module, case), case.output, rtol=0, atol=5e-6)
    assert set(account["consumed"]) == {name for name, _ in module.named_parameters()}
    assert account["format"] == kind


def test_a_recipe_says_where_its_weights_lie_and_the_run_keeps_the_account(
    convert, registry, shared, tmp_path
):
    source = shared / "fixtures/megatron/src/sat_t2v15_L4/transformer"
    text = f"""
device: cpu
video: {{frames: 17, height: 16, width: 16, fps: 8}}
predictor:
  use: cogvideox
  num_layers: 4
  num_heads: 2
  head_dim: 16
  latent_channels: 4
  text_dim: 24
  text_length: 6
  temb_dim: 16
  patch_t: 2
  weights: {{use: sat, path: {source}}}
text_encoder: {{use: t5, num_layers: 1, dim: 24, num_heads: 2, max_length: 6, tokenizer: bytes}}
autoencoder: {{use: cogvideox-vae, latent_channels: 4, base_channels: 8, blocks_per_level: 1}}
dataset: {{use: synthetic, rows: 2}}
task: {{use: train, steps: 1}}
output: {tmp_path / "run"}
"""
    spec = resolve(parse(text), registry)
    parts = place(build(spec), spec)
    parts.task.run(parts, spec)
    account = json.loads((tmp_path / "run/weights.json").read_text())
    assert account["autoencoder"]["initialised"] == 0
    assert len(account["predictor"]["consumed"]) == 112
    qkv = "model.diffusion_model.transformer.layers.3.attention.query_key_value.weight"
    assert account["predictor"]["consumed"]["transformer_blocks.3.attn1.to_k.weight"] == [qkv]
    assert "left over" in " ".join(account["predictor"]["dropped"].values())
