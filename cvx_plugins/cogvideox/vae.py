"""The 3D causal autoencoder of CogVideoX: encoder, decoder, and the ways a clip is sent through them.

Source of the architecture: CogVideoX, Yang et al. 2024 (arXiv 2408.06072), section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cvx_core import CvxError
from cvx_core.interfaces import Deps
from cvx_parallel.causal_conv import CausalConv3d, Chunk
from cvx_plugins.cogvideox.vae_blocks import (
    ConditionedNorm,
    Downsample,
    GroupNorm,
    ResidualBlock,
    Upsample,
    silu,
)
from cvx_plugins.cogvideox.vae_config import CogVideoXVAEConfig
from cvx_plugins.cogvideox.vae_tiling import balanced, chunked, run_tiles, whole

Grid = Callable[[int], tuple[int, ...]]


def build(cfg: CogVideoXVAEConfig, deps: Deps | None) -> CogVideoXVAE:  # noqa: ARG001
    """Return the autoencoder a recipe asked for."""
    return CogVideoXVAE(cfg)


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution where there is one."""

    def __init__(self, blocks: Iterable[nn.Module]):
        super().__init__()
        self.resnets = nn.ModuleList(blocks)

    def steps(self) -> Iterator[nn.Module]:
        """Yield what runs, in order."""
        for name in ("resnets", "downsamplers", "upsamplers"):
            yield from getattr(self, name, ())


class Encoder(nn.Module):
    """Map video (B,3,F,H,W) to mean and log variance (B,2C,T,h,w)."""

    def __init__(self, cfg: CogVideoXVAEConfig):
        super().__init__()
        block = partial(ResidualBlock, groups=cfg.groups, eps=cfg.norm_eps)
        widths = cfg.widths
        self.conv_in = CausalConv3d(cfg.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            inputs = [widths[max(i - 1, 0)], *[width] * (cfg.blocks_per_level - 1)]
            level = Level(block(n, width) for n in inputs)
            if i < len(widths) - 1:
                down = Downsample(width, i < cfg.temporal_levels, cfg.encode_first_frame)
                level.downsamplers = nn.ModuleList([down])
            self.down_blocks.append(level)
        self.mid_block = Level(block(widths[-1], widths[-1]) for _ in range(2))
        self.norm_out = GroupNorm(cfg.groups, widths[-1], cfg.norm_eps)
        self.conv_out = CausalConv3d(widths[-1], 2 * cfg.latent_channels)

    def forward(self, video: Tensor, chunk: Chunk) -> Tensor:
        x = self.conv_in(video, chunk)
        for level in (*self.down_blocks, self.mid_block):
            for step in level.steps():
                x = step(x, chunk)
        return self.conv_out(silu(self.norm_out(x)), chunk)


class Decoder(nn.Module):
    """Map an unscaled latent (B,C,T,h,w) to video (B,3,F,H,W); every norm is conditioned on the latent."""

    def __init__(self, cfg: CogVideoXVAEConfig):
        super().__init__()
        block = partial(
            ResidualBlock, groups=cfg.groups, eps=cfg.norm_eps, latent_channels=cfg.latent_channels
        )
        widths = cfg.widths[::-1]
        self.conv_in = CausalConv3d(cfg.latent_channels, widths[0])
        self.mid_block = Level(block(widths[0], widths[0]) for _ in range(2))
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(block(n, width) for n in [widths[max(i - 1, 0)], *[width] * cfg.blocks_per_level])
            if i < len(widths) - 1:
                up = Upsample(width, i < cfg.temporal_levels, cfg.decode_first_frame)
                level.upsamplers = nn.ModuleList([up])
            self.up_blocks.append(level)
        self.norm_out = ConditionedNorm(cfg.groups, widths[-1], cfg.latent_channels, cfg.norm_eps)
        self.conv_out = CausalConv3d(widths[-1], cfg.out_channels)

    def forward(self, latent: Tensor, chunk: Chunk) -> Tensor:
        x = self.conv_in(latent, chunk)
        for level in (self.mid_block, *self.up_blocks):
            for step in level.steps():
                x = step(x, chunk, latent)
        x = silu(self.norm_out(x, latent))
        x = self.conv_out.extend(x, chunk)
        return self.conv_out.convolve(x)


class CogVideoXVAE(nn.Module):
    """Autoencoder with a Gaussian posterior. Gradients flow where the caller has them enabled.

    Slots, besides `halo` of each causal convolution and `normalise` of each group norm:
    encode_grid, decode_grid: frames (latent frames) -> chunk lengths;
    cut: (frames, lead, unit) -> chunk lengths of a clip that is coded in one pass: `lead` frames and whole
    units in the first, units after it, what is left in the last;
    chunks: number of chunks -> indices of those to run here, in order;
    gather: (outputs of those chunks, number of chunks) -> outputs of all chunks, in order.
    """

    def __init__(self, cfg: CogVideoXVAEConfig):
        super().__init__()
        self.cfg = cfg
        self.compression = cfg.compression
        self.latent_channels = cfg.latent_channels
        self.latent_channels = cfg.latent_channels
        self.scale_factor = cfg.scale_factor
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.encode_grid: Grid = (
            self._whole_video if cfg.encode == "whole" else partial(chunked, size=cfg.encode_chunk)
        )
        decode_grids: dict[str, Grid] = {
            "whole": self._whole_latent,
            "balanced": balanced,
            "chunked": partial(chunked, size=cfg.decode_chunk),
        }
        self.decode_grid = decode_grids[cfg.decode]
        parts: Iterator[Any] = (part for net in self.one_pass() for part in net.modules())
        for part in parts:
            if hasattr(part, "by_frame"):  # else ranks that share a clip would round otherwise
                part.by_frame = True
        self.cut: Callable[[int, int, int], tuple[int, ...]] = whole
        self.chunks: Callable[[int], Iterable[int]] = range
        self.gather: Callable[[list[Tensor], int], list[Tensor]] = _all_are_here

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior's mean and standard deviation, unscaled, each (B,C,T,h,w).

        video (B,3,F,H,W) in [-1,1]; computed in the dtype of the weights. Raises CvxError on a size that does
        not divide by `compression`.
        """
        mean, logvar = self._posterior(video)
        return mean, torch.exp(0.5 * logvar)

    def encode(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a scaled latent (B,C,T,h,w): drawn from the posterior with `generator`, its mean without."""
        mean, std = self.moments(video)
        return _draw(mean, std, generator) * self.scale_factor

    def decode(self, latent: Tensor) -> Tensor:
        """Return the video (B,3,F,H,W) of a scaled latent (B,C,T,h,w). Raises CvxError on NaN or infinity."""
        self._check(latent, self.cfg.latent_channels, (1, 1), "latent")
        _finite(latent, "the latent to decode", "Check the weights, or lower the guidance")
        video = self._decode(latent / self.scale_factor)
        return _finite(video, f"the video decoded in {video.dtype}", "Decode in bfloat16 or float32")

    def reconstruct(
        self, video: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the video decoded from its own latent, and the posterior's mean and log variance.

        This is what training the autoencoder differentiates. Shapes and `generator` as in encode, or one for
        each row; unscaled.
        """
        mean, logvar = self._posterior(video)
        std = torch.exp(0.5 * logvar)
        if isinstance(generator, Sequence):
            latent = torch.stack([_draw(m, s, g) for m, s, g in zip(mean, std, generator, strict=True)])
        else:
            latent = _draw(mean, std, generator)
        return self._decode(latent), mean, logvar

    forward = reconstruct

    def initial(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Draw the biases of convolutions as torch does by default, uniform in +-1/sqrt(fan in)."""
        weight = self.get_parameter(name.removesuffix("bias") + "weight") if name.endswith(".bias") else None
        if weight is None or weight.ndim < 2:
            return None
        bound = weight[0].numel() ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def one_pass(self) -> Iterator[nn.Module]:
        """Yield the networks whose group norms look at all frames of a clip."""
        nets = {"encode": self.encoder, "decode": self.decoder}
        yield from (nets[name] for name in self.cfg.in_one_pass)

    def _whole_video(self, frames: int) -> tuple[int, ...]:
        unit = self.compression[0]
        return self.cut(frames, frames % unit if self.cfg.encode_first_frame == "odd" else 1, unit)

    def _whole_latent(self, frames: int) -> tuple[int, ...]:
        return self.cut(frames, frames % 2, 2)

    def _posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        self._check(video, self.cfg.in_channels, self.compression[1:], "video")
        mean, logvar = self._code(self.encoder, self.encode_grid, video).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def _decode(self, latent: Tensor) -> Tensor:
        return self._code(self.decoder, self.decode_grid, latent)

    def _code(self, net: nn.Module, grid: Grid, x: Tensor) -> Tensor:
        x = x.to(self.encoder.conv_in.conv.weight.dtype)
        samples = x.split(1) if self.cfg.slicing else (x,)
        done = [self._in_tiles(net, grid, sample) for sample in samples]
        return done[0] if len(done) == 1 else torch.cat(done)

    def _in_tiles(self, net: nn.Module, grid: Grid, x: Tensor) -> Tensor:
        run = partial(self._in_chunks, net, grid)
        if self.cfg.tile is None:
            return run(x)
        pixels = self.compression[1]
        unit = (pixels, 1) if net is self.encoder else (1, pixels)
        size, overlap = self.cfg.tile.in_latent(pixels)
        if x.shape[3] <= size[0] * unit[0] and x.shape[4] <= size[1] * unit[0]:
            return run(x)
        return run_tiles(run, x, unit, size, overlap)

    def _in_chunks(self, net: nn.Module, grid: Grid, x: Tensor) -> Tensor:
        parts = x.split(grid(x.shape[2]), dim=2)
        tails: dict[nn.Module, Tensor] = {}
        outputs = [net(parts[i], Chunk(i, len(parts), tails)) for i in self.chunks(len(parts))]
        return torch.cat(self.gather(outputs, len(parts)), dim=2)

    def _check(self, x: Tensor, channels: int, step: tuple[int, ...], what: str) -> None:
        if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
            raise CvxError(
                f"{what}: got shape {tuple(x.shape)}; expected (B, {channels}, frames, height, width)"
            )
        if x.shape[3] % step[0] or x.shape[4] % step[1]:
            raise CvxError(
                f"{what}: got {x.shape[3]}x{x.shape[4]} (height x width); expected multiples of {step[0]}. "
                "Resize or crop it first."
            )


def _all_are_here(outputs: list[Tensor], count: int) -> list[Tensor]:  # noqa: ARG001
    return outputs


def _draw(mean: Tensor, std: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return mean
    noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype)
    return mean + std * noise.to(mean.device)


def _finite(x: Tensor, what: str, advice: str) -> Tensor:
    """Return x. Raises CvxError where it has NaN or infinity, which players show as black frames."""
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).sum())
        raise CvxError(f"{what} has {bad} of {x.numel()} values that are NaN or infinite. {advice}.")
    return x
