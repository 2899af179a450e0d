"""Layers of the CogVideoX autoencoder: norms, residual block, resampling in time and space.

All take and return (B,C,F,H,W). Activations are overwritten in place where no gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvx_parallel.causal_conv import CausalConv3d, Chunk, in_pieces


def silu(x: Tensor) -> Tensor:
    """Return x * sigmoid(x); x is a temporary of the caller."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def kept_frames(frames: int, rule: str, chunk: Chunk) -> int:
    """Return how many leading frames (0 or 1) stay out of a resampling in time.

    A single frame always does. Otherwise "odd": where the count is odd; "alone": where the clip starts;
    "paired": none.
    """
    if frames == 1:
        return 1
    return {"odd": frames % 2, "alone": int(chunk.is_first), "paired": 0}[rule]


class GroupNorm(nn.GroupNorm):
    """Group norm with a `normalise` slot, so that ranks that hold parts of a clip can share statistics."""

    def __init__(self, groups: int, channels: int, eps: float):
        super().__init__(groups, channels, eps)
        self.normalise: Callable[[Tensor, int, Tensor, Tensor, float], Tensor] = F.group_norm

    def forward(self, x: Tensor, latent: Tensor | None = None) -> Tensor:
        """Normalise over frames, rows and columns together; `latent` is for ConditionedNorm."""
        return self.normalise(x, self.num_groups, self.weight, self.bias, self.eps)


class ConditionedNorm(nn.Module):
    """Group norm whose gain and shift are read off the latent at each place.

    Gain and shift are 1x1x1 convolutions of the latent resized to x by nearest neighbour. They are computed
    before the resize, which commutes with them, and never stored at the size of x: broadcasting repeats them
    over rows and columns. Source: MoVQ, Zheng et al. 2022 (arXiv 2209.09002), spatially conditional norm.
    """

    def __init__(self, groups: int, channels: int, latent_channels: int, eps: float):
        super().__init__()
        self.norm_layer = GroupNorm(groups, channels, eps)
        self.conv_y = CausalConv3d(latent_channels, channels, kernel=1)
        self.conv_b = CausalConv3d(latent_channels, channels, kernel=1)

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        """Return GN(x) * gain + shift for x (B,C,F,r*h,r*w) and latent (B,c,T,h,w)."""
        index = nearest_frames(x.shape[2], latent.shape[2], x.device)
        columns = x.shape[4] // latent.shape[4]
        gain, shift = (
            conv.convolve(latent).index_select(2, index).repeat_interleave(columns, dim=4)[:, :, :, :, None]
            for conv in (self.conv_y, self.conv_b)
        )
        rows = self.norm_layer(x).unflatten(3, (latent.shape[3], -1))
        out = None if torch.is_grad_enabled() else rows
        return torch.addcmul(shift, rows, gain, out=out).flatten(3, 4)


def nearest_frames(frames: int, latent_frames: int, device: torch.device) -> Tensor:
    """Return the latent frame (frames,) int64 that each frame came from.

    The decoder only doubles frames, so an odd count tells that it kept the first one apart.
    """
    kept = frames % 2 if frames > latent_frames else 0
    repeats = (frames - kept) // (latent_frames - kept)
    return torch.div(torch.arange(frames, device=device) - kept, repeats, rounding_mode="floor") + kept


class ResidualBlock(nn.Module):
    """Two rounds of norm, SiLU and causal convolution beside a shortcut.

    Where `latent_channels` is not 0, the norms are conditioned on a latent of that many channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, eps: float, latent_channels: int = 0
    ):
        super().__init__()
        self.norm1 = make_norm(groups, in_channels, eps, latent_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = make_norm(groups, out_channels, eps, latent_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.by_frame = False
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, chunk: Chunk, latent: Tensor | None = None) -> Tensor:
        # Each line drops the previous line's tensor: at most three of x's size are alive at once.
        h = silu(self.norm1(x, latent))
        h = self.conv1.extend(h, chunk)
        h = self.conv1.convolve(h)
        h = silu(self.norm2(h, latent))
        h = self.conv2.extend(h, chunk)
        h = self.conv2.convolve(h)
        if hasattr(self, "conv_shortcut"):
            x = in_pieces(self.conv_shortcut, x, 0, 1) if self.by_frame else self.conv_shortcut(x)
        return h + x if torch.is_grad_enabled() else h.add_(x)


def make_norm(groups: int, channels: int, eps: float, latent_channels: int) -> nn.Module:
    """Return a group norm, conditioned where there is a latent."""
    if latent_channels:
        return ConditionedNorm(groups, channels, latent_channels, eps)
    return GroupNorm(groups, channels, eps)


class Downsample(nn.Module):
    """Halve height and width, and time where `in_time`: means of frame pairs, then a strided convolution."""

    def __init__(self, channels: int, in_time: bool, rule: str):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.in_time = in_time
        self.rule = rule
        self.by_frame = False

    def forward(self, x: Tensor, chunk: Chunk, latent: Tensor | None = None) -> Tensor:
        if self.in_time:
            x = halve_time(x, kept_frames(x.shape[2], self.rule, chunk))
        x = F.pad(x, (0, 1, 0, 1))
        return per_frame(x, self.conv.weight, self.conv.bias, stride=2, by_frame=self.by_frame)


class Upsample(nn.Module):
    """Double height and width, and time where `in_time`: nearest neighbour, then a 3x3 convolution per frame.

    Neither resize is carried out. Output pixels of one parity see only 2x2 distinct inputs, so each of the
    four parities is a 2x2 convolution of the small frames with sums of the kernel's taps; repeated frames
    are computed once. That is 4/9 of the arithmetic, halved again where time doubles.
    """

    def __init__(self, channels: int, in_time: bool, rule: str):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.in_time = in_time
        self.rule = rule
        self.by_frame = False

    def forward(self, x: Tensor, chunk: Chunk, latent: Tensor | None = None) -> Tensor:
        batch, channels, frames, height, width = x.shape
        kept = kept_frames(frames, self.rule, chunk) if self.in_time else frames
        out = x.new_empty(batch, channels, kept + 2 * (frames - kept), 2 * height, 2 * width)
        kernels = parity_kernels(self.conv.weight)
        for row in (0, 1):
            for column in (0, 1):
                y = per_frame(x, kernels[row][column], self.conv.bias, padding=1, by_frame=self.by_frame)
                y = y[:, :, :, row : row + height, column : column + width]
                target = out[:, :, :, row::2, column::2]
                target[:, :, :kept] = y[:, :, :kept]
                target[:, :, kept::2] = y[:, :, kept:]
                target[:, :, kept + 1 :: 2] = y[:, :, kept:]
        return out


def per_frame(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0, by_frame: bool = False
) -> Tensor:
    """Return the 2D convolution of every frame; weight (O,I,kh,kw). by_frame: see CausalConv3d."""

    def convolve(x: Tensor) -> Tensor:
        return F.conv3d(x, weight[:, :, None], bias, (1, stride, stride), (0, padding, padding))

    return in_pieces(convolve, x, 0, 1) if by_frame else convolve(x)


def halve_time(x: Tensor, kept: int) -> Tensor:
    """Return the first `kept` frames, then the means of the pairs after them; an odd last frame is lost."""
    pairs = (x.shape[2] - kept) // 2
    paired = x[:, :, kept : kept + 2 * pairs]
    means = torch.lerp(paired[:, :, 0::2], paired[:, :, 1::2], 0.5)
    return torch.cat([x[:, :, :kept], means], dim=2) if kept else means


def parity_kernels(weight: Tensor) -> list[list[Tensor]]:
    """Return the 2x2 kernels [row parity][column parity] that act on a frame before its nearest doubling.

    weight (O,I,3,3). In one dimension, output 2i reads inputs i-1, i, i and output 2i+1 reads i, i, i+1.
    """

    def halves(w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        a, b, c = w.unbind(dim)
        return torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)

    return [list(halves(rows, 3)) for rows in halves(weight, 2)]
