"""The autoencoder against reference outputs of the SAT code, float32 on the CPU.

What a case needs (way of coding, first-frame rule, frame counts) follows from its key in the file.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from cvx_core.registry import Registry

TOLERANCE = 2e-5
WHOLE = {"encode": "whole", "decode": "whole"}
DECODERS = {
    "decoded_full": [WHOLE],
    "decoded_chunked": [{}, {"decode": "balanced"}],
    "decoded_no_first_frame_chunked": [
        {"decode": way, "decode_first_frame": "paired"} for way in ("chunked", "balanced")
    ],
    "decoded_first_frame_alone": [{**WHOLE, "decode_first_frame": "alone"}],
}
ENCODERS = {"moments": WHOLE, "moments_first_frame_alone": {**WHOLE, "encode_first_frame": "alone"}}


@pytest.fixture(scope="module")
def golden(shared):
    return load_file(shared / "fixtures/sat/vae/io.safetensors")


@pytest.fixture(scope="module")
def make(shared):
    component = Registry.discover().get("autoencoder", "cogvideox-vae")
    folder = shared / "fixtures/sat/vae/hf/vae"
    fields = dict(component.config.recognise(json.loads((folder / "config.json").read_text())))
    assert fields.pop("use") == component.name
    weights = {k: v.float() for k, v in load_file(folder / "diffusion_pytorch_model.safetensors").items()}

    def make(**ways):
        with torch.device("meta"):
            module = component.load()(component.config(**fields, **ways), None)
        module.load_state_dict(weights, assign=True)
        return module.requires_grad_(False)

    return make


def close(ours, golden):
    assert ours.shape == golden.shape
    torch.testing.assert_close(ours, golden, rtol=0, atol=TOLERANCE)


def test_every_output_of_the_file_is_compared(golden):
    known = {*DECODERS, *ENCODERS, "mean", "logvar", "sample"}
    outputs = {key.split(".")[1] for key in golden} - {"video", "z", "noise"}
    assert outputs == known


def test_encoded_moments(make, golden):
    cases = [key for key in golden if key.split(".")[1] in ENCODERS]
    assert len(cases) == 6
    for key in cases:
        clip, kind = key.split(".")
        mean, std = make(**ENCODERS[kind]).moments(golden[f"{clip}.video"])
        expected_mean, logvar = golden[key].chunk(2, dim=1)
        close(mean, expected_mean)
        close(2 * std.log(), logvar)


def test_encoded_mean_and_log_variance(make, golden):
    model = make(**WHOLE)
    clips = [key.split(".")[0] for key in golden if key.endswith(".mean")]
    assert len(clips) == 4
    for clip in clips:
        _, mean, logvar = model.reconstruct(golden[f"{clip}.video"])
        close(mean, golden[f"{clip}.mean"])
        close(logvar, golden[f"{clip}.logvar"])


def test_scaled_mean_is_encoded(make, golden):
    model = make(**WHOLE)
    for clip in ("f1", "f17"):
        close(model.encode(golden[f"{clip}.video"]), model.scale_factor * golden[f"{clip}.mean"])


def test_posterior_sample(make, golden):
    mean, std = make(**WHOLE).moments(golden["f5.video"])
    close(mean + std * golden["f5.noise"], golden["f5.sample"])


@pytest.mark.parametrize("kind", DECODERS)
def test_decoded_video(make, golden, kind):
    cases = [key for key in golden if key.split(".")[1] == kind]
    assert cases
    for ways in DECODERS[kind]:
        model = make(**ways)
        for key in cases:
            latent = golden[key.replace(kind, "z")]
            close(model.decode(latent * model.scale_factor), golden[key])


def test_short_clips_do_not_depend_on_chunks(make, golden):
    for clip in ("f1", "f5", "f9"):
        mean = make().moments(golden[f"{clip}.video"])[0]
        close(mean, golden[f"{clip}.mean"])
        model = make()
        close(model.decode(golden[f"{clip}.z"] * model.scale_factor), golden[f"{clip}.decoded_full"])
