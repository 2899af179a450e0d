"""Training an autoencoder: reconstruction improves, resuming is exact, the export is read back."""

from cvx_core.recipe import parse
from cvx_core.spec import resolve

RECIPE = {
    "device": "cpu",
    "video": {"frames": 9, "height": 32, "width": 32, "fps": 8},
    "autoencoder": {"use": "cogvideox-vae", "latent_channels": 4, "base_channels": 8, "blocks_per_level": 1},
    "dataset": {"use": "synthetic", "rows": 8},
    "loader": {"batch": 4},
    "optimizer": {"use": "adamw", "lr": 3e-3},
    "task": {"use": "train-autoencoder", "steps": 12, "trackers": [], "export": {"use": "hf"}},
}


def test_reconstruction_improves_and_the_export_is_read_back(launch, log_of):
    out = launch(RECIPE)
    losses = [line["loss"] for line in log_of(out)]
    assert losses[-1] < 0.8 * losses[0]
    weights = f"weights: {{use: hf, path: {out / 'model'}}}"
    fields = "latent_channels: 4, base_channels: 8, blocks_per_level: 1"
    spec = resolve(
        parse(
            f"autoencoder: {{use: cogvideox-vae, {fields}, {weights}}}\n"
            "dataset: {use: synthetic}\ntask: {use: train-autoencoder}\n"
        )
    )
    assert spec.choices["autoencoder"].weights is not None


def test_resuming_is_exact(launch, tmp_path):
    """Stopped within an epoch of four batches."""
    short = {**RECIPE, "loader": {"batch": 2}, "task": {**RECIPE["task"], "steps": 6}}
    whole = launch(short, output=str(tmp_path / "whole"))
    launch(short, output=str(tmp_path / "parts"), **{"task.stop_at": 3})
    parts = launch(short, output=str(tmp_path / "parts"), **{"task.resume": "auto"})
    name = "model/diffusion_pytorch_model.safetensors"
    assert (whole / "log.jsonl").read_bytes() == (parts / "log.jsonl").read_bytes()
    assert (whole / name).read_bytes() == (parts / name).read_bytes()
