"""Encoders on several ranks: clips in chunks, batches in rows, both; equal to one process bit for bit."""

import json
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from cvx_core import RecipeError
from cvx_core.building import build
from cvx_core.interfaces import Batch, Features, Row
from cvx_core.placing import initialise, place
from cvx_core.random import Draws
from cvx_core.recipe import parse
from cvx_core.registry import Registry
from cvx_core.run import run
from cvx_core.spec import resolve
from cvx_parallel.causal_conv import CausalConv3d
from cvx_parallel.chunks import portions
from cvx_plugins.parallel.borrowing import samples_and_chunks
from tests.distributed.counting import counted
from tests.distributed.harness import on_ranks
from tests.distributed.matrix import recipe

FRAMES = (1, 5, 9, 17, 33, 49)
UNEVEN = (3, 8, 10, 12, 27)
"""Not 4n+1: chunks of other lengths, frames that pooling drops."""
ALONE = {"encode_first_frame": "alone", "decode_first_frame": "alone"}
WHOLE = {"encode": "whole", "decode": "whole"}
WIDE = {"base_channels": 32, "latent_channels": 4}
"""Activations whose length vector registers divide: what is left over is computed otherwise by a bit, and in
one pass other ranks have other lengths.
"""


def autoencoder(fields: dict[str, Any], dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    component = Registry.discover().get("autoencoder", "cogvideox-vae")
    config = component.config(**{"base_channels": 4, "blocks_per_level": 1, "latent_channels": 2, **fields})
    module = component.load()(config, None).to(dtype)
    initialise(module, 0)
    return module.eval().requires_grad_(False)


def coded(module: torch.nn.Module, frames: int, size: tuple[int, int] = (8, 16)) -> tuple[torch.Tensor, ...]:
    """Return mean, deviation and reconstruction of a clip."""
    generator = torch.Generator().manual_seed(frames)
    dtype = next(module.parameters()).dtype
    video = torch.rand(1, 3, frames, *size, generator=generator).to(dtype) * 2 - 1
    mean, std = module.moments(video)
    return mean, std, module.decode(mean)


def code_on_ranks(cases: list[tuple[dict[str, Any], torch.dtype, tuple[int, ...]]]) -> list[Any]:
    from cvx_plugins.parallel.vae_cp import spread

    result = []
    for fields, dtype, counts in cases:
        module = autoencoder(fields, dtype)
        spread(module, dist.group.WORLD)
        result.append([coded(module, frames) for frames in counts])
    return result


EXACT = [
    ({}, torch.float32, FRAMES + UNEVEN),
    ({"decode": "balanced", "decode_first_frame": "paired"}, torch.float32, (17, 33)),
    ({"encode_chunk": 1, "decode_chunk": 1, **ALONE}, torch.float32, (1, 13)),
    ({"slicing": True, "tile": {"height": 8, "width": 8, "overlap": 0.0}}, torch.bfloat16, (9, 17)),
    ({**WHOLE, **WIDE}, torch.float32, FRAMES + UNEVEN),
    ({**WHOLE, **WIDE, **ALONE}, torch.float32, (5, 8, 13)),
]
"""Chunks as released, chunks of a single frame that need what comes before they can be handed on, tiles, and
one pass.
"""


@cache
def exact_alone() -> list[list[tuple[torch.Tensor, ...]]]:
    """Return what one process makes of these clips."""
    modules = [autoencoder(fields, dtype) for fields, dtype, _ in EXACT]
    return [
        [coded(module, frames) for frames in counts]
        for module, (_, _, counts) in zip(modules, EXACT, strict=True)
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_a_clip_on_several_ranks_is_the_same_to_the_bit(world):
    ranks = on_ranks(world, code_on_ranks, EXACT)
    for number, (fields, _, counts) in enumerate(EXACT):
        for place_, frames in enumerate(counts):
            expected = exact_alone()[number][place_]
            for rank in ranks:
                got = rank[number][place_]
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), (fields, frames)


def handed_on(frames: int) -> tuple[int, int]:
    """Return the bytes of halos that this rank sends to encode a clip, and those of one halo of each kind."""
    from cvx_plugins.parallel.vae_cp import spread

    module = autoencoder({})
    spread(module, dist.group.WORLD)
    with counted() as sent:
        module.moments(torch.zeros(1, 3, frames, 8, 16))
    convs = [conv for conv in module.encoder.modules() if isinstance(conv, CausalConv3d)]
    one: list[int] = []
    for conv in convs:
        conv.halo = lambda x, frames, past: (
            one.append(x[:, :, :1].nbytes * frames) or torch.cat([x[:, :, :1]] * frames, 2)
        )
    module.chunks, module.gather = range, lambda outputs, count: outputs
    module.moments(torch.zeros(1, 3, 8, 8, 16))
    return sum(item.size for item in sent if item.kind == "send"), sum(one)


@pytest.mark.parametrize(("world", "frames", "chunks"), [(2, 33, 4), (4, 17, 2), (2, 8, 1)])
def test_only_two_frames_of_each_convolution_travel_between_chunks(world, frames, chunks):
    """The formula of the docs: chunks - 1 times k - 1 frames of the input of every causal convolution."""
    ranks = on_ranks(world, handed_on, frames)
    assert sum(sent for sent, _ in ranks) == (chunks - 1) * ranks[0][1]
    assert ranks[0][1] > 0


def coded_wide(on_ranks: bool, counts: tuple[int, ...]) -> list[Any]:
    """Code clips in one pass with convolutions that round otherwise where they are given other lengths."""
    from cvx_plugins.parallel.vae_cp import spread

    module = autoencoder({**WHOLE, **WIDE})
    if on_ranks:
        spread(module, dist.group.WORLD)
    return [coded(module, frames, (48, 64)) for frames in counts]


@cache
def wide_alone(counts: tuple[int, ...]) -> list[Any]:
    """Return what one process makes of them."""
    return coded_wide(False, counts)


@pytest.mark.matrix
@pytest.mark.parametrize("world", [2, 4])
def test_one_pass_is_the_same_to_the_bit_whatever_the_lengths(world):
    counts = (9, 17, 29)
    for rank in on_ranks(world, coded_wide, True, counts):
        for got, want in zip(rank, wide_alone(counts), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_statistics_of_one_pass_are_of_the_whole_clip():
    in_chunks, whole = (coded(autoencoder(fields, torch.float64), 17)[0] for fields in ({}, WHOLE))
    assert (in_chunks - whole).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("frames", "lead", "ranks", "lengths"),
    [
        (49, 1, 4, (13, 12, 12, 12)),
        (33, 1, 3, (13, 12, 8)),
        (10, 2, 2, (6, 4)),
        (12, 1, 2, (5, 7)),
        (5, 1, 2, (5,)),
        (1, 1, 4, (1,)),
    ],
)
def test_portions_are_whole_units_but_for_the_ends(frames, lead, ranks, lengths):
    assert portions(frames, lead, 4, ranks) == lengths


@pytest.mark.parametrize(
    ("ranks", "batch", "factors"),
    [(4, 4, (4, 1)), (4, 2, (2, 2)), (4, 3, (1, 4)), (2, 1, (1, 2)), (6, 4, (2, 3))],
)
def test_ranks_divide_into_samples_and_chunks(ranks, batch, factors):
    assert samples_and_chunks(ranks, batch, by_sample=True, by_chunk=True) == factors


TP, ENC, VAE = {"use": "tp"}, {"use": "encoder-dp"}, {"use": "vae-cp"}


def encoded(text: str, batches: tuple[int, ...]) -> list[Features]:
    """Encode made-up batches as a recipe places the encoders."""
    spec = resolve(parse(text))
    parts = place(build(spec), spec)
    result = []
    for number, count in enumerate(batches):
        generator = torch.Generator().manual_seed(number)
        video = torch.rand(count, 3, 17, 16, 24, generator=generator) * 2 - 1
        rows = tuple(Row(str(i)) for i in range(count))
        prompts = tuple(f"prompt {'x' * i}" for i in range(count))
        draws = Draws(7, number, tuple(range(count)))
        result.append(parts.encoder(Batch(rows, prompts, video, video[:, :, 0]), draws))
    return result


def encoded_all(texts: list[str], batches: tuple[int, ...]) -> list[list[Features]]:
    return [encoded(text, batches) for text in texts]


def text(parallel: list[dict[str, Any]], batch: int = 4) -> str:
    data = yaml.safe_load(recipe("1.0-i2v", parallel, "float32", layers=1))
    return yaml.safe_dump({**data, "loader": {"batch": batch}})


@pytest.mark.parametrize("world", [2, 4])
def test_a_batch_on_several_ranks_is_the_same_to_the_bit(world):
    """Batches that do not divide or are smaller than the ranks are many; ranks as samples x chunks."""
    tp = {**TP, "size": world}
    cases = [text([tp, ENC]), text([VAE, ENC, tp], 2), text([tp, VAE])]
    if world == 4:
        cases.append(text([{"use": "ddp", "size": 2}, {**TP, "size": 2}, ENC, VAE], 1))
    expected = encoded(text([]), (4, 3, 1))
    for rank in on_ranks(world, encoded_all, cases, (4, 3, 1)):
        for result in rank:
            for got, want in zip(result, expected, strict=True):
                for field, value in want._asdict().items():
                    assert torch.equal(getattr(got, field), value), field


def test_a_run_with_all_of_them_does_what_one_process_does(tmp_path):
    """Four ranks: two that read different rows, of two each that encode the same ones together, ahead."""
    data = yaml.safe_load(text([], batch=2))
    data |= {"video": {"frames": 9, "height": 16, "width": 32}, "output": str(tmp_path / "one")}
    data["predictor"] |= {"sample_height": 2, "sample_width": 4}
    data["task"] = {"use": "train", "steps": 3, "trackers": []}
    one = yaml.safe_dump(data)
    data |= {"output": str(tmp_path / "four"), "loader": {"batch": 1}}
    data["parallel"] = [
        {"use": "zero3", "size": 2},
        {**TP, "size": 2},
        ENC,
        VAE,
        {"use": "interleave", "rounds": 2},
    ]
    trained(one)
    on_ranks(4, trained, yaml.safe_dump(data))
    one, four = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "four")
    )
    assert len(four) == 3
    for a, b in zip(one, four, strict=True):
        assert a["rows"] == b["rows"]
        assert abs(a["loss"] - b["loss"]) < 1e-5
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-5 * a["grad_norm"]


def trained(text: str) -> None:
    run(resolve(parse(text)))


@pytest.mark.parametrize(
    ("parallel", "fields", "why"),
    [
        ([ENC], {}, "pp 1 x ring 1 x ulysses 1 x tp 1 = 1 rank sees them. Add tp, cp or pp"),
        ([{"use": "zero2"}, VAE], {}, "codes chunks of a clip over the ranks that see the same rows"),
        ([{**TP, "size": 2}, ENC], {"task.memory": True}, r"memory: true.*Set task\.memory=false"),
        ([{"use": "interleave"}], {"task.memory": True}, r"memory: true.*Set task\.memory=false"),
    ],
)
def test_what_cannot_be_is_refused(parallel, fields, why):
    data = yaml.safe_load(text(parallel))
    data["task"]["image_noise"] = None
    for path, value in fields.items():
        section, field = path.split(".")
        data[section][field] = value
    with pytest.raises(RecipeError, match=why):
        resolve(parse(yaml.safe_dump(data)))
