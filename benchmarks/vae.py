"""The autoencoder against diffusers' AutoencoderKLCogVideoX: same weights, same clip, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Size, Step, fill
from cvx_core.registry import Registry

SMALL = {"base_channels": 32, "blocks_per_level": 2}
VIDEO = {"small": (1, 3, 17, 96, 144), "full": (1, 3, 9, 240, 360)}


@dataclass(frozen=True)
class Work:
    """One direction through one model, to be built on either side."""

    direction: Literal["encode", "decode"]
    device: str
    size: Size

    def config(self) -> Any:
        component = Registry.discover().get("autoencoder", "cogvideox-vae")
        assert component.config is not None
        fields: dict[str, Any] = {**(SMALL if self.size == "small" else {}), "scale_factor": 1.0}
        return component.config(**fields)

    def ours(self) -> Step:
        component = Registry.discover().get("autoencoder", "cogvideox-vae")
        model = self._placed(component.load()(self.config(), None))
        return self._step(model.encode if self.direction == "encode" else model.decode)

    def theirs(self) -> Step:
        from diffusers import AutoencoderKLCogVideoX

        model = self._placed(AutoencoderKLCogVideoX.from_config(self.config().describe()))
        if self.direction == "encode":
            return self._step(lambda video: model.encode(video).latent_dist.mode())
        return self._step(lambda latent: model.decode(latent).sample)

    def _step(self, run: Callable[[Tensor], Tensor]) -> Step:
        return partial(torch.no_grad()(run), self._input())

    def _placed(self, model: nn.Module) -> Any:
        return fill(model).to(self.device, self._dtype()).eval()

    def _input(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shape = VIDEO[self.size]
        if self.direction == "encode":
            x = torch.rand(shape, generator=generator) * 2 - 1
        else:
            config = self.config()
            places = [(n - 1) // step + 1 for n, step in zip(shape[2:], config.compression, strict=True)]
            x = torch.randn(shape[0], config.latent_channels, *places, generator=generator)
        return x.to(self.device, self._dtype())

    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16


def cases(device: str, size: Size) -> Iterable[Case]:
    """Yield both directions."""
    tolerance = 1e-4 if device == "cpu" else 1e-1
    for direction in ("encode", "decode"):
        work = Work(direction, device, size)
        yield Case(f"vae-{direction}", work.ours, work.theirs, tolerance)
