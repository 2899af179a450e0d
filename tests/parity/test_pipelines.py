"""End to end: a pipeline folder saved by diffusers samples here with a short recipe, to the same latents."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cvx_core import run
from cvx_io.video_write import read_metadata

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")

HEIGHT, WIDTH, PROMPT = 32, 48, "a red circle moving left"
TEXT = [
    "a red circle moving left",
    "the blue square is moving up and down",
    "green triangles everywhere, slowly",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=64,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder


def redrawn(module, seed):
    """Draw every parameter anew, so that nothing is zero; norms stay near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        scale = 0.3 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.05
        p.data = torch.randn(p.shape, generator=generator) * scale + float("norm" in name and p.ndim == 1)
    return module.eval()


def transformer(variant, image):
    options = {
        "1.0": {"use_rotary_positional_embeddings": image, "use_learned_positional_embeddings": image},
        "1.5": {
            "use_rotary_positional_embeddings": True,
            "patch_size_t": 2,
            "patch_bias": False,
            "ofs_embed_dim": 16 if image else None,
        },
    }[variant]
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8 if image else 4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=32,
        num_layers=2,
        sample_width=WIDTH // 8,
        sample_height=HEIGHT // 8,
        sample_frames=9,
        max_text_seq_length=16,
        **options,
    )


def save_pipeline(folder, tokenizer, variant, image, sampler):
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
        invert_scale_latents=variant == "1.5",
    )
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=256,
            d_model=32,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    parts = {
        "transformer": redrawn(transformer(variant, image), 1),
        "vae": redrawn(vae, 2),
        "text_encoder": redrawn(t5, 3),
        "tokenizer": transformers.T5Tokenizer.from_pretrained(str(tokenizer)),
        "scheduler": getattr(diffusers, f"CogVideoX{sampler.upper()}Scheduler")(
            snr_shift_scale=3.0, rescale_betas_zero_snr=True, prediction_type="v_prediction",
            timestep_spacing="trailing", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
            clip_sample=False, set_alpha_to_one=True, steps_offset=0,
        ) if sampler == "ddim" else diffusers.CogVideoXDPMScheduler(
            snr_shift_scale=1.0, rescale_betas_zero_snr=True, prediction_type="v_prediction",
            timestep_spacing="trailing", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
            clip_sample=False, set_alpha_to_one=True, steps_offset=0,
        ),
    }  # fmt: skip
    cls = diffusers.CogVideoXImageToVideoPipeline if image else diffusers.CogVideoXPipeline
    pipeline = cls(**parts)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


CASES = [
    ("1.0", False, "ddim", 9, {"guidance": 3.0}),
    ("1.0", False, "dpm", 13, {"guidance": 6.0, "dynamic_guidance": True}),
    ("1.0", True, "dpm", 9, {"guidance": 3.0}),
    ("1.0", True, "ddim", 9, {"guidance": 1.0}),
    ("1.5", False, "ddim", 9, {"guidance": 6.0, "dynamic_guidance": True}),
    ("1.5", False, "dpm", 13, {"guidance": 3.0}),
    ("1.5", True, "dpm", 9, {"guidance": 3.0}),
    ("1.5", True, "ddim", 13, {"guidance": 3.0, "dynamic_guidance": True}),
]


@pytest.mark.parametrize(("variant", "image", "sampler", "frames", "options"), CASES)
def test_the_same_noise_gives_the_same_latents(variant, image, sampler, frames, options, tokenizer, tmp_path):
    pipeline = save_pipeline(tmp_path / "pipe", tokenizer, variant, image, sampler)
    latent_frames = (frames - 1) // 4 + 1
    padded = latent_frames + (latent_frames % 2 if variant == "1.5" else 0)
    noise = torch.randn(1, padded, 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(5))
    save_file({"0": noise[0].transpose(0, 1).contiguous()}, tmp_path / "noise.safetensors")
    inputs, dataset = {}, {"use": "prompts", "prompts": [PROMPT]}
    if image:
        pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "first.png")
        inputs["image"] = Image.open(tmp_path / "first.png")
        dataset["images"] = ["first.png"]
    expected = pipeline(
        prompt=PROMPT,
        num_frames=frames,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=5,
        guidance_scale=options["guidance"],
        use_dynamic_cfg=options.get("dynamic_guidance", False),
        latents=noise.clone(),
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        max_sequence_length=16,
        **inputs,
    ).frames[:, padded - latent_frames :]
    recipe = tmp_path / "sample.yaml"
    task = {
        "use": "sample",
        "steps": 5,
        "initial_noise": "noise.safetensors",
        "save_latents": True,
        **options,
    }
    recipe.write_text(
        f"model: pipe\nvideo: {{frames: {frames}, height: {HEIGHT}, width: {WIDTH}}}\n"
        f"dataset: {dataset}\ntask: {task}\noutput: out\n".replace("True", "true").replace("False", "false")
    )
    assert len(recipe.read_text().splitlines()) <= 6
    assert run.main([str(recipe), "--set", "device=cpu"]) == 0
    [file] = (tmp_path / "out").glob("*.safetensors")
    actual = load_file(file)["latent"].transpose(0, 1)
    assert actual.shape == expected[0].shape
    assert (actual - expected[0]).abs().max() < 1e-4
    assert expected.abs().max() > 0.5
    assert read_metadata(file.with_suffix(".mp4"))["prompt"] == PROMPT


def test_the_same_seed_gives_the_same_video_as_diffusers(tokenizer, tmp_path):
    pipeline = save_pipeline(tmp_path / "pipe", tokenizer, "1.0", False, "dpm")
    expected = pipeline(
        prompt=PROMPT,
        num_frames=9,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(11),
        output_type="latent",
        max_sequence_length=16,
    ).frames[0]
    recipe = tmp_path / "sample.yaml"
    recipe.write_text(
        f"model: pipe\nseed: 11\nvideo: {{frames: 9, height: {HEIGHT}, width: {WIDTH}}}\noutput: out\n"
        f"dataset: {{use: prompts, prompts: [{PROMPT}]}}\n"
        "task: {use: sample, steps: 4, guidance: 3.0, save_latents: true}\n"
    )
    assert run.main([str(recipe), "--set", "device=cpu"]) == 0
    [file] = (tmp_path / "out").glob("*.safetensors")
    assert (load_file(file)["latent"].transpose(0, 1) - expected).abs().max() < 1e-4


TRAIN = """
device: cpu
output: trained
video: {frames: 9, height: 32, width: 48, fps: 8}
predictor:
  use: cogvideox
  positions: sincos
  num_layers: 1
  num_heads: 2
  head_dim: 16
  latent_channels: 4
  text_dim: 32
  text_length: 16
  temb_dim: 16
  sample_height: 4
  sample_width: 6
  sample_frames: 9
  out_norm_eps: 1e-5
text_encoder: {use: t5, num_layers: 1, dim: 32, num_heads: 2, tokenizer: tokenizer}
autoencoder: {use: cogvideox-vae, latent_channels: 4, base_channels: 8, blocks_per_level: 1}
scheduler: {use: dpm, snr_shift: 3.0}
dataset: {use: synthetic, rows: 2}
task: {use: train, steps: 3, trackers: [], export: {use: hf}, export_whole: true}
"""


def test_a_model_trained_here_is_a_pipeline_for_diffusers(tokenizer, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/spiece.model").write_bytes((tokenizer / "spiece.model").read_bytes())
    (tmp_path / "train.yaml").write_text(TRAIN)
    (tmp_path / "sample.yaml").write_text(
        f"model: trained/model\ndevice: cpu\noutput: out\n"
        f"video: {{frames: 9, height: {HEIGHT}, width: {WIDTH}}}\n"
        f"dataset: {{use: prompts, prompts: [{PROMPT}]}}\n"
        "task: {use: sample, steps: 4, guidance: 3.0, save_latents: true}\n"
    )
    assert run.main([str(tmp_path / "train.yaml")]) == 0
    assert run.main([str(tmp_path / "sample.yaml")]) == 0
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(tmp_path / "trained/model")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt=PROMPT,
        num_frames=9,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        max_sequence_length=16,
    ).frames[0]
    [file] = (tmp_path / "out").glob("*.safetensors")
    assert (load_file(file)["latent"].transpose(0, 1) - theirs).abs().max() < 1e-4
