"""What diffusers and PEFT make of our files, and we of theirs: a tiny model must give the same output."""

import logging
import warnings

import pytest
import torch

from cvx_core import Registry
from cvx_core.testing.format import as_tensors
from cvx_io.lora import merge

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

RANKS = {
    "patch_embed.text_proj": (2, 3.0),
    "time_embedding.linear_1": (1, 0.1),
    "transformer_blocks.0.attn1.to_q": (4, 8.0),
    "transformer_blocks.0.attn1.to_k": (4, 8.0),
    "transformer_blocks.0.attn1.to_out.0": (4, 8.0),
    "transformer_blocks.1.attn1.to_q": (2, 8.0),
    "transformer_blocks.1.attn1.to_v": (4, 1.0),
    "transformer_blocks.1.ff.net.0.proj": (3, 5.0),
    "transformer_blocks.1.norm2.linear": (4, 8.0),
    "norm_out.linear": (4, 2.0),
    "proj_out": (3, 1.5),
}
"""{module: (rank, alpha)}, alpha / rank is 1 nowhere."""


def tiny():
    """Return a model of theirs with random weights, none of them zero or one."""
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=24,
        num_layers=2,
        sample_width=8,
        sample_height=6,
        sample_frames=9,
        max_text_seq_length=6,
        use_rotary_positional_embeddings=False,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        value.data = torch.randn(value.shape, generator=generator) * 0.15
    return model


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def state(model):
    """LoRA tensors that change the output clearly."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for module, (rank, alpha) in RANKS.items():
        outputs, inputs = model.get_submodule(module).weight.shape
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.3
        tensors[f"{module}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.3
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    return tensors


@torch.no_grad()
def output(model):
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(1, 3, 4, 6, 8, generator=generator)
    text = torch.randn(1, 6, 24, generator=generator)
    return model(latent, text, torch.tensor([500]), return_dict=False)[0]


def pipeline(model):
    """Return their pipeline without the parts that loading a LoRA does not touch."""
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    return diffusers.CogVideoXPipeline(**parts, transformer=model)


def merged_output(state, scale=1.0):
    model = tiny()
    base = as_tensors(model.state_dict())
    model.load_state_dict(dict(merge(base, as_tensors(state), scale).read()))
    return output(model)


def assert_same(found, wanted, plain):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (wanted - plain).abs().max() > 0.1


@pytest.fixture
def quiet(caplog):
    """Let diffusers' messages reach caplog, and turn warnings into failures; none may be there at the end."""
    logger = logging.getLogger("diffusers")
    propagates, logger.propagate = logger.propagate, True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    logger.propagate = propagates
    said = [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.WARNING]
    assert said == []


def test_diffusers_models_load_our_file(model, state, make, quiet, tmp_path):
    make("diffusers-lora").write(tmp_path / "out", as_tensors(state))
    plain = output(model)
    model.load_lora_adapter(tmp_path / "out", prefix="transformer", use_safetensors=True)
    assert_same(output(model), merged_output(state), plain)


def test_diffusers_pipelines_load_our_file(model, state, make, quiet, tmp_path):
    make("diffusers-lora").write(tmp_path / "out", as_tensors(state))
    plain = output(model)

    pipeline(model).load_lora_weights(tmp_path / "out")
    assert_same(output(model), merged_output(state), plain)


def test_diffusers_pipelines_refuse_alpha_tensors(model, state):
    with pytest.raises(ValueError, match="Make sure all LoRA param names contain"):
        pipeline(model).load_lora_weights({f"transformer.{name}": tensor for name, tensor in state.items()})


def test_peft_loads_our_folder(model, state, make, quiet, tmp_path):
    make("peft").write(tmp_path / "out", as_tensors(state))
    plain = output(model)
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    assert_same(output(wrapped), merged_output(state), plain)


def test_peft_loads_our_folder_into_our_model(make, quiet, tmp_path):
    component = Registry.discover().get("predictor", "cogvideox")
    sizes = {"num_layers": 1, "num_heads": 2, "head_dim": 16, "text_dim": 24, "temb_dim": 16}
    ours = component.load()(component.config(**sizes), None)
    factors = {
        "transformer_blocks.0.attn1.to_k.lora_A.weight": torch.ones(2, 32),
        "transformer_blocks.0.attn1.to_k.lora_B.weight": torch.ones(32, 2),
        "transformer_blocks.0.attn1.to_k.alpha": torch.tensor(3.0),
    }
    make("peft").write(tmp_path / "out", as_tensors(factors))
    weight = ours.transformer_blocks["0"].attn1.to_k.weight.detach().clone()
    wrapped = peft.PeftModel.from_pretrained(ours, tmp_path / "out").merge_and_unload()
    torch.testing.assert_close(wrapped.transformer_blocks["0"].attn1.to_k.weight, weight + 3.0)


CONFIG = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["to_q", "to_out.0", "proj_out"],
    "rank_pattern": {"transformer_blocks.1.attn1.to_q": 2, "proj_out": 3},
    "alpha_pattern": {"to_out.0": 1, r"^transformer_blocks\.0\.attn1\.to_q": 0.3},
    "init_lora_weights": False,
}


def test_we_read_what_peft_saves(model, make, tmp_path):
    torch.manual_seed(3)
    plain = output(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**CONFIG))
    wrapped.save_pretrained(tmp_path / "theirs")
    found = make("peft").open(tmp_path / "theirs")
    assert len(found.index) == 15
    assert_same(output(wrapped), merged_output(dict(found.read())), plain)


def test_we_read_what_diffusers_saves(model, make, tmp_path):
    torch.manual_seed(3)
    plain = output(model)
    model.add_adapter(peft.LoraConfig(**CONFIG), "default")
    diffusers.CogVideoXPipeline.save_lora_weights(
        tmp_path / "theirs",
        transformer_lora_layers=peft.get_peft_model_state_dict(model, adapter_name="default"),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    found = make("diffusers-lora").open(tmp_path / "theirs")
    assert_same(output(model), merged_output(dict(found.read())), plain)


def test_a_scale_means_what_it_does_in_diffusers(model, state, make, tmp_path):
    make("diffusers-lora").write(tmp_path / "out", as_tensors(state))
    plain = output(model)
    model.load_lora_adapter(tmp_path / "out", adapter_name="mine", use_safetensors=True)
    model.set_adapters("mine", 0.5)
    assert_same(output(model), merged_output(state, 0.5), plain)
