"""The autoencoder against diffusers' AutoencoderKLCogVideoX: same weights, same clips, float32 on the CPU."""

import json

import pytest
import torch

from cvx_core.registry import Registry

diffusers = pytest.importorskip("diffusers", reason="the reference implementation")
TOLERANCE = 1e-5
SMALL = {"base_channels": 8, "channel_multipliers": (1, 2, 2, 3), "blocks_per_level": 2, "latent_channels": 6}
OTHERS = {
    "three-levels": {"base_channels": 8, "channel_multipliers": (2, 1, 3), "blocks_per_level": 1},
    "two-frames": {"base_channels": 4, "temporal_compression": 2, "blocks_per_level": 1},
    "eight-frames": {"base_channels": 4, "temporal_compression": 8, "blocks_per_level": 1},
}


@pytest.fixture(scope="module")
def component():
    return Registry.discover().get("autoencoder", "cogvideox-vae")


@pytest.fixture(scope="module")
def pair(component):
    """Return (ours, theirs) with the same weights; none of them is zero or one."""

    def pair(fields=SMALL, **ways):
        config = component.config(**fields, **ways)
        described = json.loads(json.dumps(config.describe()))
        theirs = diffusers.AutoencoderKLCogVideoX.from_config(described).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for parameter in theirs.parameters():
            # scaled so that outputs are of the size of pixels, where the tolerance means what it says
            fan_in = 4 * parameter[0].numel() if parameter.ndim > 1 else 25
            drawn = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
            parameter.copy_(drawn + (parameter.ndim == 1))
        with torch.device("meta"):
            ours = component.load()(config, None)
        ours.load_state_dict(theirs.state_dict(), assign=True)
        return ours.requires_grad_(False), theirs

    return pair


@pytest.fixture(scope="module")
def plain(pair):
    return pair()


def clip(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) * 2 - 1


def close(ours, theirs):
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def compare(ours, theirs, video):
    """Compare moments, a posterior draw and the decoded draw."""
    posterior = theirs.encode(video).latent_dist
    mean, std = ours.moments(video)
    close(mean, posterior.mean)
    close(std, posterior.std)
    latent = ours.encode(video, torch.Generator().manual_seed(3))
    sample = posterior.sample(torch.Generator().manual_seed(3))
    close(latent / ours.scale_factor, sample)
    close(ours.decode(sample * ours.scale_factor), theirs.decode(sample).sample)


@pytest.mark.parametrize("frames", [1, 5, 8, 9, 12, 16, 17, 33])
def test_clips_of_any_length(plain, frames):
    compare(*plain, clip(1, 3, frames, 16, 24))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (24, 40), (56, 8)])
def test_odd_latent_sizes(plain, height, width):
    compare(*plain, clip(2, 3, 9, height, width))


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_other_shapes_of_the_network(pair, fields):
    compare(*pair(fields), clip(1, 3, 17, 16, 16))


def test_one_long_chunk_equals_coding_in_one_pass(pair):
    ours, theirs = pair(encode="whole", decode="whole")
    theirs.num_sample_frames_batch_size = theirs.num_latent_frames_batch_size = 100
    compare(ours, theirs, clip(1, 3, 17, 16, 16))


def test_sliced_batch(pair):
    ours, theirs = pair(slicing=True)
    theirs.enable_slicing()
    compare(ours, theirs, clip(3, 3, 9, 16, 16))


@pytest.mark.parametrize(
    ("tile", "height", "width"),
    [
        ({"height": 32, "width": 32, "overlap": 0.25}, 64, 64),
        ({"height": 32, "width": 40, "overlap": (0.25, 0.2)}, 88, 72),
        ({"height": 32, "width": 32, "overlap": (0.5, 0.25)}, 56, 24),
        ({"height": 48, "width": 40, "overlap": (1 / 6, 0.2)}, 40, 48),
        ({"height": 16, "width": 24, "overlap": (0.5, 1 / 3)}, 24, 40),
    ],
)
def test_tiles(pair, tile, height, width):
    ours, theirs = pair(tile=tile)
    shares = ours.cfg.tile.overlap
    theirs.enable_tiling(
        tile["height"], tile["width"], *(shares if isinstance(shares, tuple) else (shares, shares))
    )
    compare(ours, theirs, clip(1, 3, 9, height, width))


def test_gradients_of_a_reconstruction(pair):
    ours, theirs = pair()
    ours.load_state_dict({name: p.clone() for name, p in theirs.state_dict().items()}, assign=True)
    video = clip(1, 3, 9, 16, 16)
    for model in (ours, theirs):
        model.requires_grad_(True)
    ours.reconstruct(video)[0].square().mean().backward()
    theirs(video).sample.square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        close(parameter.grad, expected[name].grad)


def test_full_size_has_the_same_names_and_shapes(component):
    with torch.device("meta"):
        ours = component.load()(component.config(), None).state_dict()
        theirs = diffusers.AutoencoderKLCogVideoX().state_dict()
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in theirs.items()}


def test_described_folder_loads_into_diffusers(component, tmp_path):
    from safetensors.torch import save_file

    from cvx_core.placing import initialise

    config = component.config(**SMALL)
    ours = component.load()(config, None).requires_grad_(False)
    initialise(ours, seed=1)
    save_file(ours.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(config.describe())))
    theirs = diffusers.AutoencoderKLCogVideoX.from_pretrained(tmp_path)
    assert theirs.config.scaling_factor == config.scale_factor
    with torch.no_grad():
        compare(ours, theirs, clip(1, 3, 9, 16, 16))
