"""A 3D convolution that looks at the past only, and what it hands from one chunk of a clip to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Halo = Callable[[Tensor, int, "Tensor | None"], Tensor]
"""Slot (x, frames, past) -> (B,C,frames,H,W): the frames in front of x.

`past` is what the previous chunk of the same clip left in this process, None where there was none.
"""

LARGEST_INPUT = 2**30
"""Elements one convolution may read: accelerator kernels count in 32 bits. Longer inputs go in pieces."""


@dataclass(frozen=True)
class Chunk:
    """A run of consecutive frames on its way through a network: chunk `index` of `count`.

    tails holds the last frames each convolution read. It lives as long as one pass over one clip: the chunks
    of a clip share it, two calls never do.
    """

    index: int = 0
    count: int = 1
    tails: dict[nn.Module, Tensor] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


def past_or_first_frame(x: Tensor, frames: int, past: Tensor | None) -> Tensor:
    """Return the tail of the previous chunk, or the first frame repeated: the default of the `halo` slot."""
    return past if past is not None else torch.cat([x[:, :, :1]] * frames, dim=2)


def in_pieces(convolve: Callable[[Tensor], Tensor], x: Tensor, before: int, step: int) -> Tensor:
    """Return what a convolution makes of x (B,C,F,H,W), `step` frames of its output at a time.

    before: frames in front of one that it reads for it.
    """
    starts = range(0, x.shape[2] - before, step)
    return torch.cat([convolve(x[:, :, i : i + step + before]) for i in starts], dim=2)


class CausalConv3d(nn.Module):
    """Convolution over a cube: `kernel` frames that end at the current one, zero-padded in space.

    by_frame: whether frames of the output are computed one by one, so that no bit of them depends on how many
    there are. `extend` and `convolve` are the two halves of `forward`. A caller that is short of memory runs
    them one after the other, so that its own copy of x is gone when the output is made.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, padding=(0, kernel // 2, kernel // 2))
        self.frames = kernel - 1
        self.halo: Halo = past_or_first_frame
        self.keeps_tail = True  # False where the halo does not come from this process
        self.by_frame = False

    def extend(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Return x (B,C,F,H,W) with its halo in front, and keep its tail for the next chunk."""
        if not self.frames:
            return x
        x = torch.cat([self.halo(x, self.frames, chunk.tails.pop(self, None)), x], dim=2)
        if self.keeps_tail and not chunk.is_last:
            chunk.tails[self] = x[:, :, -self.frames :].clone()
        return x

    def convolve(self, x: Tensor) -> Tensor:
        """Return the convolution of an extended x; it has `kernel - 1` frames fewer."""
        if self.by_frame:
            return in_pieces(self.conv, x, self.frames, 1)
        if x.numel() <= LARGEST_INPUT:
            return self.conv(x)
        step = max(1, LARGEST_INPUT // (x.numel() // x.shape[2]) - self.frames)
        return in_pieces(self.conv, x, self.frames, step)

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Return (B,C',F,H,W) for x (B,C,F,H,W)."""
        return self.convolve(self.extend(x, chunk))
