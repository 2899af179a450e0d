"""What every autoencoder must satisfy: shapes, frame counts, determinism, no state between calls, slots.

Give fields that make the model small. Latent channels are read off what `moments` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cvx_core.errors import CvxError
from cvx_core.placing import initialise
from cvx_core.registry import Registry
from cvx_core.testing import Check, Suite

BATCH = 2


@dataclass(frozen=True)
class Subject:
    """An autoencoder under test: its config, and how to make it and clips for it."""

    name: str
    fields: dict[str, Any]

    def on_meta(self) -> Any:
        """Build the module as the core does."""
        component = Registry.discover().get("autoencoder", self.name)
        assert component.config is not None, f"autoencoder {self.name!r} has no config"
        with torch.device("meta"):
            return component.load()(component.config(**{**component.preset, **self.fields}), None)

    def make(self, seed: int = 0) -> Any:
        """Build the module with weights drawn from a seed."""
        module = self.on_meta().to_empty(device="cpu").eval().requires_grad_(False)
        initialise(module, seed)
        return module

    def clip(self, chunks: int, seed: int = 1) -> Tensor:
        """Return a clip of one frame plus `chunks` pairs of latent frames, higher than wide, in [-1,1]."""
        frames, height, width = self.on_meta().compression
        shape = (BATCH, 3, 2 * chunks * frames + 1, 3 * height, 2 * width)
        return torch.rand(shape, generator=_generator(seed)) * 2 - 1


def suite(name: str, **fields: Any) -> Suite:
    """Return the checks of autoencoder `name`, made with `fields` on top of its preset."""
    subject = Subject(name, fields)
    checks = (
        *_building(subject),
        *_coding(subject),
        *_purity(subject),
        *_slots(subject),
        *_training(subject),
    )
    return Suite.of(name, *checks)


def _building(subject: Subject) -> list[Check]:
    def builds_on_meta_without_buffers() -> None:
        module = subject.on_meta()
        assert [name for name, p in module.named_parameters() if not p.is_meta] == []
        assert [name for name, _ in module.named_buffers()] == []

    def states_its_compression_and_scale() -> None:
        module = subject.on_meta()
        assert len(module.compression) == 3
        assert all(isinstance(n, int) and n >= 1 for n in module.compression)
        assert isinstance(module.latent_channels, int)
        assert module.scale_factor > 0

    return [builds_on_meta_without_buffers, states_its_compression_and_scale]


def _coding(subject: Subject) -> list[Check]:
    def moments_have_the_compressed_shape() -> None:
        module = subject.make()
        for chunks in (0, 1, 2):
            video = subject.clip(chunks)
            mean, std = module.moments(video)
            frames, height, width = module.compression
            places = ((video.shape[2] - 1) // frames + 1, video.shape[3] // height, video.shape[4] // width)
            assert mean.shape == std.shape == (BATCH, module.latent_channels, *places)
            assert bool((std > 0).all())
            assert bool(mean.isfinite().all())

    def clips_come_back_with_their_shape() -> None:
        module = subject.make()
        for chunks in (0, 1, 2):
            video = subject.clip(chunks)
            assert module.decode(module.encode(video)).shape == video.shape

    def encode_without_a_generator_is_the_scaled_mean() -> None:
        module, video = subject.make(), subject.clip(1)
        torch.testing.assert_close(module.encode(video), module.moments(video)[0] * module.scale_factor)

    def encode_with_a_generator_draws_from_the_posterior() -> None:
        module, video = subject.make(), subject.clip(1)
        mean, std = module.moments(video)
        noise = torch.randn(mean.shape, generator=_generator(5))
        drawn = module.encode(video, _generator(5))
        torch.testing.assert_close(drawn, (mean + std * noise) * module.scale_factor)
        assert not torch.equal(drawn, module.encode(video, _generator(6)))

    def decode_undoes_the_scale() -> None:
        module, video = subject.make(), subject.clip(1)
        latent = module.encode(video)
        before = module.decode(latent)
        module.scale_factor *= 2
        torch.testing.assert_close(module.decode(2 * latent), before, rtol=1e-4, atol=1e-5)

    def the_last_frame_reaches_the_last_latent() -> None:
        module, video = subject.make(), subject.clip(2)
        changed = video.clone()
        changed[:, :, -1] = -changed[:, :, -1]
        latent, other = module.encode(video), module.encode(changed)
        assert not torch.equal(latent[:, :, -1], other[:, :, -1])

    def latents_that_are_not_finite_are_refused() -> None:
        module = subject.make()
        latent = module.encode(subject.clip(0))
        for bad in (float("nan"), float("inf")):
            broken = latent.clone()
            broken[0, 0, 0, 0, 0] = bad
            with pytest.raises(CvxError):
                module.decode(broken)

    return [
        moments_have_the_compressed_shape,
        clips_come_back_with_their_shape,
        encode_without_a_generator_is_the_scaled_mean,
        encode_with_a_generator_draws_from_the_posterior,
        decode_undoes_the_scale,
        the_last_frame_reaches_the_last_latent,
        latents_that_are_not_finite_are_refused,
    ]


def _purity(subject: Subject) -> list[Check]:
    def calls_leave_no_state() -> None:
        module, video, other = subject.make(), subject.clip(2), subject.clip(1, seed=9)
        latent = module.encode(video)
        decoded = module.decode(latent)
        module.decode(module.encode(other))
        assert torch.equal(module.encode(video), latent)
        assert torch.equal(module.decode(latent), decoded)

    def a_call_that_failed_leaves_no_state() -> None:
        module, video = subject.make(), subject.clip(2)
        latent = module.encode(video)
        decoded = module.decode(latent)
        for call, broken in ((module.encode, video[:, :1]), (module.decode, latent[:, :1])):
            with pytest.raises((CvxError, RuntimeError)):
                call(broken)
        assert torch.equal(module.encode(video), latent)
        assert torch.equal(module.decode(latent), decoded)

    def inputs_are_not_written_to() -> None:
        module, video = subject.make(), subject.clip(1)
        kept = video.clone()
        latent = module.encode(video)
        assert torch.equal(video, kept)
        kept = latent.clone()
        module.decode(latent)
        assert torch.equal(latent, kept)

    def samples_of_a_batch_do_not_mix() -> None:
        module, video = subject.make(), subject.clip(1)
        both = module.encode(video)
        alone = torch.cat([module.encode(sample) for sample in video.split(1)])
        torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)
        decoded = torch.cat([module.decode(sample) for sample in both.split(1)])
        torch.testing.assert_close(module.decode(both), decoded, rtol=1e-4, atol=1e-5)

    return [
        calls_leave_no_state,
        a_call_that_failed_leaves_no_state,
        inputs_are_not_written_to,
        samples_of_a_batch_do_not_mix,
    ]


def _slots(subject: Subject) -> list[Check]:
    """Slots are optional; one that is there must do what strategies count on."""

    def chunks_run_in_the_order_the_slot_gives() -> None:
        module, video = subject.make(), subject.clip(2)
        if not hasattr(module, "chunks"):
            pytest.skip("no `chunks` slot")
        assert list(module.chunks(3)) == [0, 1, 2]
        latent = module.encode(video)
        asked: list[int] = []
        given: list[int] = []

        def spy(count: int) -> Iterator[int]:
            asked.append(count)
            for index in range(count):
                given.append(index)
                yield index

        module.chunks = spy
        assert torch.equal(module.encode(video), latent)
        assert asked
        assert given == [index for count in asked for index in range(count)]

    def halo_slots_decide_what_a_convolution_sees() -> None:
        module, video = subject.make(), subject.clip(2)
        convs = [m for m in module.modules() if hasattr(m, "halo")]
        if not convs:
            pytest.skip("no `halo` slot")
        latent = module.encode(video)
        calls: list[Any] = []
        for conv in convs:
            conv.halo = _counted(conv.halo, calls)
        assert torch.equal(module.encode(video), latent)
        assert calls
        assert all(frames == shape[2] for frames, shape in calls)
        for conv in convs:
            conv.halo = _zeros
        assert not torch.equal(module.encode(video), latent)

    return [chunks_run_in_the_order_the_slot_gives, halo_slots_decide_what_a_convolution_sees]


def _training(subject: Subject) -> list[Check]:
    def reconstruction_is_differentiable() -> None:
        module, video = subject.make().requires_grad_(True), subject.clip(1)
        if not hasattr(module, "reconstruct"):
            pytest.skip("no `reconstruct`: cannot be trained")
        reconstruction, mean, logvar = module.reconstruct(video, _generator(5))
        assert reconstruction.shape == video.shape
        with torch.no_grad():
            expected = module.moments(video)
        torch.testing.assert_close(mean, expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.exp(logvar / 2), expected[1], rtol=1e-4, atol=1e-5)
        (reconstruction.square().mean() + logvar.square().mean()).backward()
        blind = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert blind == []

    return [reconstruction_is_differentiable]


def _counted(halo: Callable[..., Tensor], calls: list[Any]) -> Callable[..., Tensor]:
    def counted(x: Tensor, frames: int, past: Tensor | None) -> Tensor:
        head = halo(x, frames, past)
        calls.append((frames, head.shape))
        return head

    return counted


def _zeros(x: Tensor, frames: int, past: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_zeros(*x.shape[:2], frames, *x.shape[3:])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
