"""A clip coded by several ranks: chunks taken in turns, halos handed on, group norms over all frames.

Chunk i is coded on rank i mod P, with the same frames and the same statistics as in one process, so the
result is the same to the bit. No gradients: the tensors that travel carry none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cvx_parallel.causal_conv import CausalConv3d, past_or_first_frame
from cvx_parallel.collectives import all_gather

Normalise = Callable[[Tensor, int, "Tensor | None", "Tensor | None", float], Tensor]
Pending = tuple[list[Any], Tensor]
"""Transfers that are under way, and what they fill."""


def portions(frames: int, lead: int, unit: int, ranks: int) -> tuple[int, ...]:
    """Return how a clip is cut for ranks: whole units each, as equal as can be, longer ones first.

    The first portion also has the `lead` frames in front, the last one those that fill no unit.
    """
    units = (frames - lead) // unit
    count = min(ranks, units)
    if count < 2:
        return (frames,)
    lengths = [unit * (units // count + (i < units % count)) for i in range(count)]
    lengths[0] += lead
    lengths[-1] += frames - sum(lengths)
    return tuple(lengths)


class Relay:
    """The ranks of a group, coding one clip at a time. All of them make the same calls and get all of it.

    Its methods fill slots of an autoencoder: `chunks`, `gather`, `cut`; `halo_of` and `norm_of` make those of
    causal convolutions and group norms. One pass begins with `chunks` and ends with `gather`.
    """

    def __init__(self, group: dist.ProcessGroup, like: Callable[[], Tensor]):
        """like: returns a tensor of the dtype and on the device that chunks come out as. Collective."""
        self._group, self._like = group, like
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._index = self._count = 0
        self._lengths: tuple[int, ...] = ()
        self._ahead: dict[CausalConv3d, Pending] = {}
        self._sent: list[Pending] = []
        self._frames: dict[Any, list[int]] = {}
        dist.barrier(group=group)  # all ranks at once: some backends cannot begin with a part of them

    def cut(self, frames: int, lead: int, unit: int) -> tuple[int, ...]:
        """Return the portions of a clip that one process would code in one pass."""
        self._lengths = portions(frames, lead, unit, self._size)
        return self._lengths

    def chunks(self, count: int) -> Iterator[int]:
        """Yield the chunks of this rank, every P-th one, and begin a pass."""
        self._ahead, self._sent, self._count = {}, [], count
        for index in range(self._rank, count, self._size):
            self._index = index
            yield index

    def gather(self, outputs: list[Tensor], count: int) -> list[Tensor]:
        """Return the outputs of all chunks, (B,C,F,H,W) each, in order, and end the pass.

        One all-reduce of their shapes and one all-gather of as much as the busiest rank has.
        """
        assert not any(output.requires_grad for output in outputs)
        for works, _ in self._sent:
            _wait(works)
        dtype, device = self._like().dtype, self._like().device
        shapes = torch.zeros(count, 5, dtype=torch.int64, device=device)
        for place, output in enumerate(outputs):
            shapes[self._rank + place * self._size] = torch.tensor(output.shape, device=device)
        dist.all_reduce(shapes, group=self._group)
        sizes = [torch.Size(shape) for shape in shapes.tolist()]
        totals = [sum(size.numel() for size in sizes[rank :: self._size]) for rank in range(self._size)]
        mine = torch.empty(max(totals), dtype=dtype, device=device)
        if outputs:
            mine[: totals[self._rank]] = torch.cat([output.reshape(-1) for output in outputs])
        every = torch.empty(self._size, len(mine), dtype=dtype, device=device)
        all_gather(every.view(-1), mine, group=self._group)
        result: list[Tensor] = [mine] * count
        for rank in range(self._size):
            here = sizes[rank :: self._size]
            parts = every[rank, : totals[rank]].split([size.numel() for size in here])
            result[rank :: self._size] = [part.view(size) for part, size in zip(parts, here, strict=True)]
        return result

    def halo_of(self, conv: CausalConv3d) -> Callable[[Tensor, int, Tensor | None], Tensor]:
        """Return the `halo` slot of a convolution: the frames that the rank before left, ours to the next.

        A tail that does not depend on what comes is sent first, so that ranks do not wait for each other.
        """

        def halo(x: Tensor, frames: int, _past: Tensor | None) -> Tensor:
            if self._rank == 0:  # what it needs came while its last chunk was here
                head = past_or_first_frame(x, frames, self._arrived(conv))
                self._send(_tail(head, x, frames))
                if self._index + self._size < self._count:
                    coming = torch.empty_like(head)
                    self._ahead[conv] = self._start([self._from_before(coming)]), coming
                return head
            head = x.new_empty(*x.shape[:2], frames, *x.shape[3:])
            if x.shape[2] >= frames:
                _wait(self._start([*self._to_next(_tail(head, x, frames)), self._from_before(head)]))
            else:
                _wait(self._start([self._from_before(head)]))
                self._send(_tail(head, x, frames))
            return head

        return halo

    def norm_of(self, module: nn.Module) -> Normalise:
        """Return the `normalise` slot of a group norm that looks at all frames of a clip.

        Ranks swap frames for groups, normalise their groups over all frames, and swap back: twice the
        activation travels, and every group is computed as one process computes it.
        """

        def normalise(
            x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
        ) -> Tensor:
            if self._count == 1:
                return F.group_norm(x, groups, weight, bias, eps)
            frames = self._frames_of((module, self._lengths), x)
            batch, channels, _, *area = x.shape
            width = channels // groups
            shares = [width * len(part) for part in torch.arange(groups).tensor_split(self._count)]
            mine, first = shares[self._rank], sum(shares[: self._rank])
            room = [x.new_empty(batch, mine, count, *area) for count in frames]
            whole = torch.cat(self._swap(x.split(shares, dim=1), room), dim=2)
            if mine:
                gain, shift = (v if v is None else v[first : first + mine] for v in (weight, bias))
                whole = F.group_norm(whole, mine // width, gain, shift, eps)
            room = [x.new_empty(batch, share, *x.shape[2:]) for share in shares]
            return torch.cat(self._swap(whole.split(frames, dim=2), room), dim=1)

        return normalise

    def _frames_of(self, key: Any, x: Tensor) -> list[int]:
        """Return the frames that each rank has of an activation (B,C,F,H,W); asked once for a key."""
        if key not in self._frames:
            own = torch.tensor([x.shape[2]], device=x.device)
            every = self._swap([own] * self._count, [torch.empty_like(own) for _ in range(self._count)])
            self._frames[key] = torch.cat(every).tolist()
        return self._frames[key]

    def _swap(self, pieces: Sequence[Tensor], got: list[Tensor]) -> list[Tensor]:
        """Send a piece to each of the ranks that code this clip, and return what each of them sent."""
        ops = []
        for rank, (piece, room) in enumerate(zip(pieces, got, strict=True)):
            if rank == self._rank:
                got[rank] = piece
                continue
            if piece.numel():
                ops.append(self._op(dist.isend, piece.contiguous(), rank))
            if room.numel():
                ops.append(self._op(dist.irecv, room, rank))
        _wait(self._start(ops))
        return got

    def _arrived(self, conv: CausalConv3d) -> Tensor | None:
        if conv not in self._ahead:
            return None
        works, tail = self._ahead.pop(conv)
        _wait(works)
        return tail

    def _send(self, tail: Tensor) -> None:
        """Give a tail to the next rank, if its chunk is not the last; hold it until it has gone."""
        ops = self._to_next(tail)
        self._sent = [(works, held) for works, held in self._sent if not all(w.is_completed() for w in works)]
        if ops:
            self._sent.append((self._start(ops), ops[0].tensor))

    def _to_next(self, tail: Tensor) -> list[dist.P2POp]:
        if self._index == self._count - 1:
            return []
        return [self._op(dist.isend, tail.contiguous(), (self._rank + 1) % self._size)]

    def _from_before(self, room: Tensor) -> dist.P2POp:
        return self._op(dist.irecv, room, (self._rank - 1) % self._size)

    def _op(self, kind: Any, tensor: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, group=self._group, group_peer=rank)

    def _start(self, ops: list[dist.P2POp]) -> list[Any]:
        return dist.batch_isend_irecv(ops) if ops else []


def _tail(head: Tensor, x: Tensor, frames: int) -> Tensor:
    """Return the last frames of x with `head` in front, which is not looked at where x has enough."""
    return x[:, :, -frames:] if x.shape[2] >= frames else torch.cat([head, x], dim=2)[:, :, -frames:]


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        work.wait()
