"""What the autoencoder does beyond the conformance kit: chunks, tiles, slots, resampling, precision."""

import copy

import pytest
import torch
import torch.nn.functional as F

from cvx_core import CvxError
from cvx_core.placing import initialise
from cvx_core.registry import Registry
from cvx_parallel import causal_conv
from cvx_parallel.causal_conv import CausalConv3d, Chunk
from cvx_plugins.cogvideox import vae_blocks, vae_tiling

SMALL = {"base_channels": 4, "channel_multipliers": (1, 2, 2, 3), "blocks_per_level": 1, "latent_channels": 4}


@pytest.fixture
def make():
    component = Registry.discover().get("autoencoder", "cogvideox-vae")

    def make(**fields):
        module = component.load()(component.config(**SMALL, **fields), None)
        initialise(module, seed=0)
        return module.eval().requires_grad_(False)

    return make


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("frames", "sizes"), [(1, (1,)), (7, (7,)), (8, (8,)), (9, (9,)), (17, (9, 8)), (31, (15, 8, 8))]
)
def test_chunks_put_the_remainder_first(frames, sizes):
    assert vae_tiling.chunked(frames, 8) == sizes


@pytest.mark.parametrize(
    ("frames", "sizes"), [(1, (1,)), (3, (3,)), (5, (3, 2)), (21, (3, *[2] * 9)), (41, (5, *[4] * 9))]
)
def test_balanced_chunks_are_ten_at_most(frames, sizes):
    assert vae_tiling.balanced(frames) == sizes


@pytest.mark.parametrize(
    ("frames", "rule", "index", "kept"),
    [
        (1, "paired", 1, 1),
        (5, "odd", 1, 1),
        (4, "odd", 0, 0),
        (4, "alone", 0, 1),
        (4, "alone", 1, 0),
        (5, "paired", 0, 0),
    ],
)
def test_first_frame_is_kept_by_rule(frames, rule, index, kept):
    assert vae_blocks.kept_frames(frames, rule, Chunk(index, 2)) == kept


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("in_time", [True, False])
def test_upsampling_equals_resize_then_convolution(frames, in_time):
    up = vae_blocks.Upsample(5, in_time, "odd")
    x = randn(2, 5, frames, 3, 4)
    kept = 1 if frames == 3 else 0
    wide = F.interpolate(x, scale_factor=(1, 2, 2))
    if in_time and frames > 1:
        wide = torch.cat([wide[:, :, :kept], wide[:, :, kept:].repeat_interleave(2, dim=2)], dim=2)
    images = wide.transpose(1, 2).flatten(0, 1)
    expected = up.conv(images).unflatten(0, (2, -1)).transpose(1, 2)
    torch.testing.assert_close(up(x, Chunk()), expected, rtol=0, atol=1e-6)


def test_conditioned_norm_equals_resize_then_convolution():
    norm = vae_blocks.ConditionedNorm(2, 4, 3, 1e-6)
    x, latent = randn(2, 4, 9, 4, 12), randn(2, 3, 3, 2, 3, seed=1)
    index = [0, 1, 1, 1, 1, 2, 2, 2, 2]
    resized = latent[:, :, index].repeat_interleave(2, dim=3).repeat_interleave(4, dim=4)
    expected = norm.norm_layer(x) * norm.conv_y.conv(resized) + norm.conv_b.conv(resized)
    torch.testing.assert_close(norm(x, latent), expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(norm(x, latent), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sizes", [(5,), (3, 2), (1, 1, 3), (1, 1, 1, 1, 1)])
def test_causal_convolution_in_chunks_equals_one_pass(sizes):
    conv, x, tails = CausalConv3d(3, 4), randn(2, 3, 5, 4, 4), {}
    parts = x.split(sizes, dim=2)
    pieces = [conv(part, Chunk(i, len(parts), tails)) for i, part in enumerate(parts)]
    torch.testing.assert_close(torch.cat(pieces, dim=2), conv(x, Chunk()), rtol=0, atol=1e-6)
    assert tails == {}


def test_causal_convolution_sees_the_past_only():
    conv, x = CausalConv3d(3, 4), randn(1, 3, 5, 4, 4)
    changed = x.clone()
    changed[:, :, 3:] += 1
    assert torch.equal(conv(x, Chunk())[:, :, :3], conv(changed, Chunk())[:, :, :3])


def test_long_input_is_convolved_in_pieces(monkeypatch):
    conv, x = CausalConv3d(3, 4), randn(1, 3, 9, 4, 4)
    whole = conv(x, Chunk())
    monkeypatch.setattr(causal_conv, "LARGEST_INPUT", 5 * 3 * 4 * 4)
    torch.testing.assert_close(conv(x, Chunk()), whole, rtol=0, atol=1e-6)


def test_pass_that_breaks_off_leaves_nothing_behind(make):
    module, video = make(), randn(1, 3, 17, 8, 8).clamp(-1, 1)
    latent = module.encode(video)
    halo = module.encoder.conv_out.halo

    def breaks(x, frames, past):
        if past is not None:
            raise KeyboardInterrupt
        return halo(x, frames, past)

    module.encoder.conv_out.halo = breaks
    with pytest.raises(KeyboardInterrupt):
        module.encode(video)
    module.encoder.conv_out.halo = halo
    assert torch.equal(module.encode(video), latent)


def test_slots_can_spread_chunks_over_copies_of_the_model(make):
    """Two copies take turns; each halo comes from the other's chunk, as it would from another rank."""
    module, video = make(), randn(1, 3, 25, 8, 8).clamp(-1, 1)
    expected = module.encode(video)
    copies = [copy.deepcopy(module) for _ in range(2)]
    mailbox, done = {}, []
    for twin in copies:
        for name, conv in twin.named_modules():
            if isinstance(conv, CausalConv3d):
                conv.halo = _from_mailbox(mailbox, name)
    for index in range(3):
        twin = copies[index % 2]
        twin.chunks = lambda count, index=index: [index]
        twin.gather = lambda outputs, count: done.append(outputs[0]) or outputs
        twin.encode(video)
    mean = torch.cat(done, dim=2).chunk(2, dim=1)[0]
    assert torch.equal(mean * module.scale_factor, expected)


def _from_mailbox(mailbox, name):
    def halo(x, frames, past):
        head = mailbox.pop(name, None)
        head = causal_conv.past_or_first_frame(x, frames, head)
        mailbox[name] = torch.cat([head, x], dim=2)[:, :, -frames:]
        return head

    return halo


def test_gather_slot_returns_what_other_ranks_made(make):
    module, latent = make(), randn(1, 4, 5, 2, 2)
    expected = module.decode(latent)
    module.gather = lambda outputs, count: outputs[::-1]
    swapped = module.decode(latent)
    assert swapped.shape == expected.shape
    torch.testing.assert_close(swapped[:, :, :8], expected[:, :, 9:], rtol=0, atol=0)


def test_normalise_slot_sees_what_is_normalised(make):
    module, video = make(encode="whole"), randn(1, 3, 17, 8, 8).clamp(-1, 1)
    expected = module.encode(video)
    calls = []
    norm = module.encoder.norm_out
    plain = norm.normalise
    norm.normalise = lambda x, *rest: calls.append(x.shape) or plain(x, *rest)
    assert torch.equal(module.encode(video), expected)
    assert calls == [(1, 12, 5, 1, 1)]


def test_tile_as_large_as_the_clip_changes_nothing(make):
    video = randn(1, 3, 9, 16, 24).clamp(-1, 1)
    latent = make().encode(video)
    tiled = make(tile={"height": 16, "width": 24, "overlap": 0.5})
    assert torch.equal(tiled.encode(video), latent)
    assert torch.equal(tiled.decode(latent), make().decode(latent))


def test_tiles_of_a_local_function_blend_to_it():
    x = randn(1, 2, 3, 7, 5)
    tiled = vae_tiling.run_tiles(lambda tile: tile * 2, x, unit=(1, 1), size=(4, 3), overlap=(2, 1))
    torch.testing.assert_close(tiled, x * 2, rtol=0, atol=1e-6)


def test_gradients_are_those_of_the_path_without_shortcuts(make):
    """In-place steps are taken without gradients only; both paths give the same numbers."""
    module, latent = make(), randn(1, 4, 3, 2, 3)
    with torch.no_grad():
        inference = module.decode(latent)
    torch.testing.assert_close(module.requires_grad_(True).decode(latent).detach(), inference)


def test_gradient_matches_finite_differences(make):
    module = make().double()
    latent = randn(1, 4, 2, 1, 1).double().requires_grad_()
    weights = randn(1, 3, 8, 8, 8, seed=4).double()
    (module.decode(latent) * weights).sum().backward()
    direction, step = randn(1, 4, 2, 1, 1, seed=5).double(), 1e-5
    with torch.no_grad():
        ahead, behind = (module.decode(latent + sign * step * direction) for sign in (1, -1))
    slope = ((ahead - behind) * weights).sum() / (2 * step)
    torch.testing.assert_close((latent.grad * direction).sum(), slope, rtol=1e-5, atol=1e-8)


def test_untrained_model_learns_a_clip(make):
    module, video = make().requires_grad_(True), randn(1, 3, 1, 16, 16).clamp(-1, 1)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    errors = []
    for _ in range(25):
        error = (module(video)[0] - video).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.9 * errors[0]


def test_half_precision_weights_compute_in_half_precision(make):
    module, video = make(), randn(1, 3, 9, 16, 16).clamp(-1, 1)
    latent = module.encode(video)
    half = module.bfloat16().encode(video)
    assert half.dtype == torch.bfloat16
    assert (half.float() - latent).abs().max() < 0.1 * latent.abs().max()


@pytest.mark.parametrize(
    ("shape", "says"),
    [((1, 3, 5, 12, 16), "12x16"), ((1, 4, 5, 16, 16), "expected"), ((3, 5, 16, 16), "expected")],
)
def test_video_of_a_wrong_shape_is_an_error(make, shape, says):
    with pytest.raises(CvxError, match=says):
        make().encode(torch.zeros(shape))


def test_decoding_that_overflows_is_an_error(make):
    module = make().half()
    module.decoder.conv_out.conv.bias.fill_(6e4)
    module.decoder.conv_out.conv.weight.fill_(6e4)
    with pytest.raises(CvxError, match="bfloat16"):
        module.decode(randn(1, 4, 1, 2, 2).half())
