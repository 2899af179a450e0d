"""Layers shared out over ranks: column and row parallel linear layers, with or without a shared sequence.

Parameters are DTensors, activations plain tensors. Between a column layer and the row layer after it a rank
computes with its own columns. `Exchange` says what ranks hand over before the one and after the other.

Replicated parameters see a part of what they are used for, so their gradients are parts of a whole; `Whole`
puts them together once per step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from cvx_core.interfaces import Tokens
from cvx_parallel.collectives import Group, exchanged, rank_in, scattered_sum, size_of, summed
from cvx_parallel.gradients import in_buckets, local
from cvx_parallel.pieces import Sizes, gather, join, padded, shares


class Exchange(Protocol):
    """What ranks hand over around a pair of column and row layers, on sequences (B,L+S,D), text first."""

    def enter(self, x: Tensor) -> Tensor:
        """Return what a column layer reads."""
        ...

    def leave(self, x: Tensor) -> Tensor:
        """Return the sum of what the ranks' row layers made."""
        ...


class Replicated:
    """Every rank has the whole sequence. One all-reduce forward, after the row layer, and one backward."""

    def __init__(self, group: Group):
        self._group = group

    def enter(self, x: Tensor) -> Tensor:
        return _Copy.apply(x, self._group)

    def leave(self, x: Tensor) -> Tensor:
        return _Reduce.apply(x, self._group)


class Shared:
    """Every rank has some of the video and all of the text; sizes differ by one token at most.

    Video: all-gather before column layers, reduce-scatter after row layers. Text: an all-reduce after row
    layers, forward and backward. All are exact adjoints of maps over all ranks, of which each computes the
    same loss: gradients come out as many times too large as there are ranks (see `Whole`).
    """

    def __init__(self, group: Group):
        self._group, self._rank, self._world = group, rank_in(group), size_of(group)
        self._known: dict[tuple[int, ...], Sizes] = {}
        self._text, self._sizes = 0, (0,) * self._world

    def split(self, tokens: Tokens) -> Tokens:
        """Keep this rank's share of the video. Positions stay whole: attention sees all of it.

        A copy: a view would keep the rest in memory, and have the first block compiled for its strides alone.
        """
        sizes = self._known[tokens.grid] = shares(tokens.video.shape[1], self._world)
        mine = tokens.video.split(sizes, dim=1)[self._rank]
        return tokens._replace(video=mine.clone(memory_format=torch.contiguous_format))

    def join(self, tokens: Tokens) -> Tokens:
        """Return the whole video on every rank, each of which goes on with the same computation."""
        return tokens._replace(video=join(tokens.video, self._sizes_of(tokens), self._group))

    def watch(self, block: Any) -> None:
        """Note the lengths of what enters a block's body, which its layers cannot tell apart."""
        body = block.body

        def noted(tokens: Tokens) -> Tokens:
            self._text, self._sizes = tokens.text.shape[1], self._sizes_of(tokens)
            return body(tokens)

        block.body = noted

    def enter(self, x: Tensor) -> Tensor:
        return _Enter.apply(x, self._text, self._sizes, self._group)

    def leave(self, x: Tensor) -> Tensor:
        return _Leave.apply(x, self._text, self._sizes, self._group)

    def _sizes_of(self, tokens: Tokens) -> Sizes:
        """Return every rank's share; ranks that did not split the tokens themselves ask, once per grid."""
        if tokens.grid not in self._known:
            mine = torch.tensor([tokens.video.shape[1]], device=tokens.video.device)
            self._known[tokens.grid] = tuple(map(int, gather(mine, 0, (1,) * self._world, self._group)))
        return self._known[tokens.grid]


def matching(module: nn.Module, patterns: Iterable[str]) -> dict[str, Any]:
    """Return the modules whose name matches a pattern, in which * stands for one component."""
    patterns = tuple(patterns)
    return {
        name: found
        for name, found in module.named_modules()
        for pattern in patterns
        if name.count(".") == pattern.count(".") and fnmatchcase(name, pattern)
    }


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Tell whether a parameter or module lies in one of the named modules."""
    return any(name.startswith(f"{outer}.") for outer in modules)


def share_sequence(predictor: Any, shared: Shared) -> None:
    """Put the shares between a predictor's own split and join, and tell them of what enters each block."""
    split, join = predictor.split, predictor.join
    predictor.split = lambda tokens: split(shared.split(tokens))
    predictor.join = lambda tokens: shared.join(join(tokens))
    for block in predictor.blocks.values():
        shared.watch(block)


def make_column(layer: Any, mesh: DeviceMesh, exchange: Exchange | None, heads: int | None) -> None:
    """Share out the outputs of a linear layer. exchange: None where the module around it has entered.

    heads: how many the outputs are; a rank then computes whole ones. Of the LoRA of an adapted layer, the
    second factor is shared out likewise.
    """
    _shard(layer, mesh, {"weight": 0, "bias": 0})
    parts = _Parts(mesh, layer.out_features, heads)
    if is_adapted := hasattr(layer, "beside"):
        _shard(layer.lora_B, mesh, {"weight": 0})

    def forward(x: Tensor) -> Tensor:
        if exchange is not None:
            x = exchange.enter(x)
        bias = parts(layer.bias, 0) if layer.bias is not None else None
        out = F.linear(x, parts(layer.weight, 0), bias)
        if is_adapted:
            out = out + layer.beside(x, layer.lora_A.weight, parts(layer.lora_B.weight, 0))
        return out

    layer.forward = forward


def make_row(layer: Any, mesh: DeviceMesh, exchange: Exchange, heads: int | None) -> None:
    """Share out the inputs of a linear layer, as `make_column` does the outputs of the one before.

    Every rank has the bias and adds it once the outputs are summed. Of the LoRA of an adapted layer, the
    first factor is shared out likewise.
    """
    _shard(layer, mesh, {"weight": 1})
    parts = _Parts(mesh, layer.in_features, heads)
    if is_adapted := hasattr(layer, "beside"):
        _shard(layer.lora_A, mesh, {"weight": 1})

    def forward(x: Tensor) -> Tensor:
        out = F.linear(x, parts(layer.weight, 1))
        if is_adapted:
            out = out + layer.beside(x, parts(layer.lora_A.weight, 1), layer.lora_B.weight)
        out = exchange.leave(out)
        return out + layer.bias if layer.bias is not None else out

    layer.forward = forward


def enter_once(module: nn.Module, exchange: Exchange) -> None:
    """Enter before a module whose several column layers read its first argument: once for all of them."""
    module.register_forward_pre_hook(lambda _module, args: (exchange.enter(args[0]), *args[1:]))


def _shard(layer: nn.Module, mesh: DeviceMesh, dims: dict[str, int]) -> None:
    for name, dim in dims.items():
        param = getattr(layer, name)
        if param is not None:
            shared = distribute_tensor(param, mesh, [Shard(dim)], src_data_rank=None)
            setattr(layer, name, nn.Parameter(shared, requires_grad=param.requires_grad))


class _Parts:
    """The part of a parameter that a rank computes with.

    It is the part it holds, but where the heads do not divide: shards are equal then, and the rows of a head
    that lies across two ranks are handed over on each use.
    """

    def __init__(self, mesh: DeviceMesh, count: int, heads: int | None):
        self._group, world = mesh.get_group(), mesh.size()
        most = -(-count // world)
        self._held = tuple(max(0, min(most, count - rank * most)) for rank in range(world))
        used = shares(heads, world) if heads is not None else self._held
        self._used = tuple(size * count // heads for size in used) if heads is not None else used

    def __call__(self, param: Tensor, dim: int) -> Tensor:
        part = param.to_local() if isinstance(param, DTensor) else param
        if self._used == self._held:
            return part
        moved: Tensor = _Repartition.apply(part.transpose(0, dim), self._held, self._used, self._group)
        return moved.transpose(0, dim)


class Whole:
    """Makes gradients whole, once per step: those of some parameters are summed over a group, all are scaled.

    partial: names of parameters whose gradients are parts; scaled: names of those that `scale` applies to.
    """

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup,
        partial: Collection[str],
        scaled: Collection[str] = (),
        scale: float = 1.0,
    ):
        self._module, self._group, self._scale = module, group, scale
        self._partial, self._scaled = frozenset(partial), frozenset(scaled)

    def __call__(self) -> None:
        """Change gradients in place; collective, for every rank of the group has the same gradients."""
        for grads in in_buckets(self._gradients(self._partial)):
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat, group=self._group)
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))
        for grad in self._gradients(self._scaled):
            grad.mul_(self._scale)

    def _gradients(self, names: Collection[str]) -> Iterator[Tensor]:
        for name, param in self._module.named_parameters():
            if name in names and param.grad is not None:
                yield local(param.grad)


def _scatter_sum(x: Tensor, sizes: Sizes, group: Any) -> Tensor:
    """Return this rank's part (B,sizes[rank],D) of the sum of all ranks' x (B,sum(sizes),D)."""
    whole = torch.cat([padded(piece, 1, max(sizes)) for piece in x.split(sizes, dim=1)])
    return scattered_sum(whole, group)[:, : sizes[rank_in(group)]]


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return summed(grad, ctx.group), None


class _Reduce(Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor, group: Any) -> Tensor:
        return summed(x, group)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Enter(Function):
    """[text, part of the video] to [text, video]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, text: int, sizes: Sizes, group: Any) -> Tensor:
        ctx.args = text, sizes, group
        return torch.cat([x[:, :text], *gather(x[:, text:], 1, sizes, group)], dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        text, sizes, group = ctx.args
        video = _scatter_sum(grad[:, text:], sizes, group)
        return torch.cat([grad[:, :text], video], dim=1), None, None, None


class _Leave(Function):
    """[text, video] to be summed over ranks, to [text, part of the video]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, text: int, sizes: Sizes, group: Any) -> Tensor:
        ctx.args = text, sizes, group
        return torch.cat([summed(x[:, :text], group), _scatter_sum(x[:, text:], sizes, group)], dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        text, sizes, group = ctx.args
        video = gather(grad[:, text:], 1, sizes, group)
        return torch.cat([summed(grad[:, :text], group), *video], dim=1), None, None, None


class _Repartition(Function):
    """Rows (held[rank],...) to rows (used[rank],...) of the same whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Sizes, used: Sizes, group: Any) -> Tensor:
        ctx.args = used, held, group
        return _move(x, held, used, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _move(grad, *ctx.args), None, None, None


def _move(x: Tensor, source: Sizes, target: Sizes, group: Any) -> Tensor:
    rank = rank_in(group)
    sent, received = overlaps(rank, source, target), overlaps(rank, target, source)
    return exchanged(x.contiguous(), received, sent, group)


def overlaps(rank: int, mine: Sizes, theirs: Sizes) -> list[int]:
    """Return how much of this rank's run of rows lies in each rank's run, when cut another way."""
    start = sum(mine[:rank])
    end = start + mine[rank]
    ends = list(accumulate(theirs))
    return [max(0, min(end, e) - max(start, e - size)) for e, size in zip(ends, theirs, strict=True)]
