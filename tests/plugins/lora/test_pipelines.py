"""LoRAs trained and exported here load in diffusers' pipelines: same noise, same weights, same latents."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from cvx_core import run
from tests.parity.test_pipelines import PROMPT, save_pipeline, tokenizer  # noqa: F401 - a fixture

HEIGHT, WIDTH, FRAMES, STEPS = 32, 48, 9, 3
VIDEO = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fps": 8}
SHARES = {"first": 0.7, "second": -1.5}


def launch(folder: Path, name: str, **recipe) -> Path:
    """Run a recipe on the pipeline in a folder; return its output."""
    recipe = {"model": "pipe", "device": "cpu", "output": name, "video": VIDEO, **recipe}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    assert run.main([str(folder / f"{name}.yaml")]) == 0
    return folder / name


def train(folder: Path, name: str, **adapter) -> Path:
    return launch(
        folder,
        name,
        seed=len(name),
        adapter={"use": "lora", "rank": 2, "alpha": 3, **adapter},
        dataset={"use": "synthetic", "rows": 2},
        optimizer={"use": "adamw", "lr": 5e-2},
        task={"use": "train", "steps": 2, "trackers": [], "export": {"use": "diffusers-lora"}},
    )


def sample(folder: Path, name: str, image: bool, shares: dict[str, float]) -> torch.Tensor:
    """Return final latents (T,C,h,w) with the LoRAs of runs at their shares."""
    dataset = {"use": "prompts", "prompts": [PROMPT]} | ({"images": ["first.png"]} if image else {})
    adapters = [
        {
            "use": "merged-lora",
            "scale": share,
            "weights": {"use": "diffusers-lora", "path": f"{run_}/adapter"},
        }
        for run_, share in shares.items()
    ]
    task = {"use": "sample", "steps": STEPS, "guidance": 3.0, "save_latents": True}
    [file] = launch(folder, name, dataset=dataset, adapters=adapters, task=task).glob("*.safetensors")
    return load_file(file)["latent"].transpose(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["1.0", "1.5"])
@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
def test_diffusers_samples_the_same_with_two_loras(variant, image, tokenizer, tmp_path):  # noqa: F811
    pytest.importorskip("peft", reason="diffusers loads no LoRA without it")
    pipeline = save_pipeline(tmp_path / "pipe", tokenizer, variant, image, "ddim")
    inputs = {}
    if image:
        pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "first.png")
        inputs["image"] = Image.open(tmp_path / "first.png")

    def theirs() -> torch.Tensor:
        latents = pipeline(
            prompt=PROMPT,
            num_frames=FRAMES,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            max_sequence_length=16,
            **inputs,
        ).frames
        return latents[0][1 if variant == "1.5" else 0 :]  # without the frame that fills a patch

    plain = theirs()
    train(tmp_path, "first")
    train(tmp_path, "second", targets=["to_out.0", "ff.net.*", "proj", "linear"], blocks=[1])
    for name in SHARES:
        pipeline.load_lora_weights(tmp_path / name / "adapter", adapter_name=name)
    pipeline.set_adapters(list(SHARES), list(SHARES.values()))
    tuned = theirs()
    assert (tuned - plain).abs().max() > 0.05
    torch.testing.assert_close(sample(tmp_path, "out", image, SHARES), tuned, rtol=0, atol=1e-4)
    torch.testing.assert_close(sample(tmp_path, "base", image, {}), plain, rtol=0, atol=1e-4)
