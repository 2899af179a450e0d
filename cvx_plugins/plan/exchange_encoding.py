"""What coding a clip in chunks takes on one of the ranks that share it, in one step. No other exchange of
encoders is stated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cvx_parallel.causal_conv import CausalConv3d, past_or_first_frame
from cvx_parallel.chunks import portions
from cvx_parallel.tensor import shares
from cvx_plugins.plan.member import Member, Sent


@dataclass
class Coded:
    """One pass over one clip, elements. outputs: of each chunk; halo: of all frames that one chunk needs of
    the one before; normed: shapes (B,C,F,...) by chunk of each norm over all frames, and its groups.
    """

    outputs: list[int] = field(default_factory=list)
    halo: int = 0
    normed: dict[nn.Module, tuple[int, list[torch.Size]]] = field(default_factory=dict)


def of_chunks(member: Member) -> Iterator[Sent]:
    """Yield what halos take, the outputs that every rank gets, their shapes, and norms over all frames."""
    sample = member.passes.sample
    if "vae-cp" not in member.layout.strategies or sample.autoencoder is None:
        return
    ranks, place = member.size("chunks"), member.place("chunks")
    rows = member.rows * ranks // member.size("model")
    each = next(sample.autoencoder.parameters()).dtype.itemsize
    for clip in coded(sample.autoencoder, sample.clips, ranks):
        count = len(clip.outputs)
        handed = len(range(place, count - 1, ranks)) * clip.halo
        swapped = sum(_swapped(groups, shapes, place) for groups, shapes in clip.normed.values())
        yield Sent("send", "chunks", rows * (handed + swapped) * each)
        most = max(sum(clip.outputs[rank::ranks]) for rank in range(ranks))
        yield Sent("all_gather", "chunks", rows * ranks * most * each)
        yield Sent("all_reduce", "chunks", rows * count * 5 * torch.int64.itemsize)


def _swapped(groups: int, shapes: Sequence[torch.Size], place: int) -> int:
    """Return what a rank sends to swap frames for groups, and the other way once these are normed."""
    if place >= len(shapes) or len(shapes) == 1:
        return 0
    batch, channels, frames, *area = shapes[place]
    mine = shares(groups, len(shapes))[place] * (channels // groups)
    others = sum(shape[2] for shape in shapes) - frames
    return batch * torch.Size(area).numel() * ((channels - mine) * frames + mine * others)


def coded(autoencoder: Any, clips: Sequence[tuple[int, ...]], ranks: int) -> list[Coded]:
    """Return the passes that encoding clips takes, on the meta device. What is coded in one pass elsewhere is
    in as many portions as there are ranks.
    """
    module, passes = deepcopy(autoencoder), [Coded()]

    def gather(outputs: list[Tensor], count: int) -> list[Tensor]:
        passes[-1].outputs = [output.numel() for output in outputs]
        passes[-1].halo //= count
        passes.append(Coded())
        return outputs

    def halo(x: Tensor, frames: int, past: Tensor | None) -> Tensor:
        passes[-1].halo += x[:, :, :1].numel() * frames
        return past_or_first_frame(x, frames, past)

    module.gather, module.cut = gather, partial(portions, ranks=ranks)
    for conv in (part for part in module.modules() if isinstance(part, CausalConv3d)):
        conv.halo = halo
    for norm in (part for net in module.one_pass() for part in net.modules() if hasattr(part, "normalise")):
        norm.normalise = _noting(norm, norm.normalise, passes)
    with torch.no_grad():
        for shape in clips:
            module.moments(torch.empty(shape, device="meta"))
    return passes[:-1]


def _noting(norm: nn.Module, normalise: Any, passes: Sequence[Coded]) -> Any:
    def noted(x: Tensor, groups: int, *rest: Any) -> Tensor:
        passes[-1].normed.setdefault(norm, (groups, []))[1].append(x.shape)
        result: Tensor = normalise(x, groups, *rest)
        return result

    return noted
