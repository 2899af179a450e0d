"""The LoRA adapter: linear layers that add a low-rank product, in place and under the names they had."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvx_core.errors import CvxError, FormatError, did_you_mean
from cvx_core.interfaces import Deps, Tensors
from cvx_core.placing import default_initial
from cvx_io.lora import A, B, Shape, alphas_of, compare, merge, modules, stating, without_alpha
from cvx_io.lora_state import single
from cvx_io.regroup import listed
from cvx_plugins.lora.adapter_config import LoraConfig, Where

ROUNDING = 2.0**-24
"""The change of a weight, relative to it, that float32 cannot hold."""


class BlocksError(CvxError):
    """Blocks that the predictor does not have."""


class AdaptedLinear(nn.Linear):
    """A linear layer that turned into one with LoRA. Strategies that compute it otherwise use `beside`."""

    lora_A: nn.Linear  # noqa: N815 - what every LoRA file calls it
    lora_B: nn.Linear  # noqa: N815
    scale: float
    dropout: float

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.beside(x, self.lora_A.weight, self.lora_B.weight)

    def beside(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return what is added to the output, for x (...,in), a (rank,in), b (out,rank) or parts of them."""
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return F.linear(F.linear(x, a), b) * self.scale


class Lora:
    """Adds A and B to the target layers of a predictor, and freezes everything else."""

    def __init__(self, cfg: LoraConfig, deps: Deps):
        self.cfg, self._where = cfg, cfg.where(deps.spec)
        self._shapes: dict[str, Shape] = {}

    def apply(self, predictor: nn.Module) -> list[str]:
        """Change the predictor in place; return the names of A and B. Raises CvxError on useless targets."""
        predictor.requires_grad_(False)
        for name in targets(predictor, self._where):
            layer = predictor.get_submodule(name)
            adapt(layer, self.cfg)
            assert isinstance(layer, AdaptedLinear)
            self._shapes[name] = Shape(self.cfg.rank, layer.in_features, layer.out_features)
        return [f"{name}{end}" for name in self._shapes for end in (A, B)]

    @contextmanager
    def off(self, predictor: nn.Module) -> Iterator[None]:
        """Have a predictor compute what it would without the adapter, to the bit where A and B are finite."""
        layers = [layer for layer in predictor.modules() if isinstance(layer, AdaptedLinear)]
        scales = [layer.scale for layer in layers]
        for layer in layers:
            layer.scale = 0.0
        try:
            yield
        finally:
            for layer, scale in zip(layers, scales, strict=True):
                layer.scale = scale

    def initial(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return A uniform in +-1/sqrt(in) or Gaussian, as PEFT draws it, and B zero: nothing changes yet."""
        if name.endswith(B):
            return torch.zeros(shape)
        if self.cfg.init == "gaussian":
            return torch.randn(shape, generator=generator) / self.cfg.rank
        return default_initial(name, shape, generator)

    def adopt(self, tensors: Tensors, where: str) -> Tensors:
        """Return A and B of all targets out of a file's, which must be of the same layers, rank and alpha.

        Raises FormatError naming what differs, and the settings that would fit.
        """
        shapes, alphas = modules(tensors, where), alphas_of(tensors)
        _check_same_modules(shapes, self._shapes, where)
        ranks = {shape.rank for shape in shapes.values()}
        if ranks != {self.cfg.rank}:
            remedy = f"Set it to {ranks.pop()}" if len(ranks) == 1 else "Merge it with `cvx convert` instead"
            found = f"has rank {', '.join(map(str, sorted({s.rank for s in shapes.values()})))}"
            raise FormatError(f"{where}: {found}, but adapter.rank is {self.cfg.rank}. {remedy}.")
        stated = set(alphas.values())
        if stated and stated != {single(self.cfg.alpha)}:
            said = ", ".join(f"{alpha:g}" for alpha in sorted(stated))
            remedy = f"Set it to {said}" if len(stated) == 1 else "Merge it with `cvx convert` instead"
            raise FormatError(
                f"{where}: has alpha {said}, but adapter.alpha is {self.cfg.alpha:g}. {remedy}."
            )
        if len(alphas) < len(shapes) and "alpha" not in self.cfg.model_fields_set:
            raise FormatError(
                f"{where}: states no alpha for {len(shapes) - len(alphas)} modules, and a file has no "
                "default. State adapter.alpha."
            )
        for name, wanted in self._shapes.items():
            if shapes[name] != wanted:
                raise FormatError(
                    f"{where}: {name!r} is {shapes[name].outputs}x{shapes[name].inputs}, in the predictor "
                    f"{wanted.outputs}x{wanted.inputs}. Is the LoRA for another model?"
                )
        return without_alpha(tensors)

    def held(self, tensors: Tensors) -> Tensors:
        """Return A, B and alpha of every target, out of the predictor's parameters."""
        names = [f"{name}{end}" for name in self._shapes for end in (A, B)]
        own = Tensors({name: tensors.index[name] for name in names}, tensors.load)
        return stating(own, dict.fromkeys(self._shapes, self.cfg.alpha))

    def effect(self, tensors: Tensors) -> list[str]:
        """Return the modules whose weight W alpha / rank * B A changes by less than 2^-24 |W|.

        tensors: the predictor's parameters. Raises CvxError where these are all modules, or where a factor is
        not finite.
        """
        still = []
        for name in self._shapes:
            a, b, weight = (tensors.load(name + end).double() for end in (A, B, ".weight"))
            square = float(((b.T @ b) * (a @ a.T)).sum())  # of the Frobenius norm of B A
            if not math.isfinite(square):
                raise CvxError(
                    f"LoRA of {name!r} is not finite. Lower optimizer.lr; the checkpoints before are kept."
                )
            change = math.sqrt(max(square, 0.0)) * self.cfg.alpha / self.cfg.rank
            if change <= ROUNDING * float(weight.norm()):
                still.append(name)
        if len(still) == len(self._shapes):
            raise CvxError(
                f"the LoRA changes nothing: alpha / rank * B A is zero, or lost in float32, in all of "
                f"{len(still)} modules: {listed(still)}. Is optimizer.lr zero or far too small? Nothing was "
                "exported; the checkpoints are kept."
            )
        return still

    def compare(self, ours: Tensors, source: Tensors, where: str) -> None:
        """Raise FormatError where alpha / rank * B A of two files differs."""
        compare(ours, source, where)

    def merged(self, tensors: Tensors) -> Tensors:
        """Return the predictor's parameters with the change worked in, as `cvx convert` merges it."""
        lora = self.held(tensors)
        base = {name: info for name, info in tensors.index.items() if name not in lora.index}
        return merge(Tensors(base, tensors.load), lora)


def adapt(layer: nn.Module, cfg: LoraConfig) -> None:
    """Turn a linear layer into an adapted one, with factors on its device and in its dtype."""
    assert isinstance(layer, nn.Linear)
    like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    layer.__class__ = AdaptedLinear
    assert isinstance(layer, AdaptedLinear)
    layer.lora_A = nn.Linear(layer.in_features, cfg.rank, bias=False, **like)
    layer.lora_B = nn.Linear(cfg.rank, layer.out_features, bias=False, **like)
    layer.scale, layer.dropout = cfg.alpha / cfg.rank, cfg.dropout


def targets(module: nn.Module, where: Where) -> list[str]:
    """Return the names of the linear layers that are meant, in the order of the module.

    Raises CvxError on a pattern that matches none, and where there is no pattern; BlocksError on blocks that
    are not there.
    """
    if not where.patterns:
        raise CvxError(f"a {type(module).__name__} names no layers for LoRA. List some in adapter.targets.")
    linear = [name for name, part in module.named_modules() if type(part) is nn.Linear]
    place = f"the {type(module).__name__}"
    if where.chosen is not None:
        linear = _inside(linear, module, where.blocks, where.chosen)
        place = f"the blocks chosen of {place}"
    for pattern in where.patterns:
        if not any(matches(name, pattern) for name in linear):
            length = pattern.count(".") + 1
            ends = {".".join(name.split(".")[-length:]) for name in linear}
            hint = did_you_mean(pattern, sorted(ends)) or f" They end in {', '.join(sorted(ends))}."
            raise CvxError(f"{pattern!r} matches no linear layer of {place}.{hint}")
    return [name for name in linear if any(matches(name, pattern) for pattern in where.patterns)]


def matches(name: str, pattern: str) -> bool:
    """Tell whether the last components of a name are those of a pattern."""
    wanted = pattern.split(".")
    found = name.split(".")[-len(wanted) :]
    return len(found) == len(wanted) and all(map(fnmatchcase, found, wanted))


def _inside(linear: Sequence[str], module: nn.Module, blocks: str, chosen: Sequence[int]) -> list[str]:
    """Return the layers of some blocks. Raises BlocksError on numbers of blocks that are not there."""
    count = len(list(module.get_submodule(blocks).children()))
    if absent := [str(number) for number in chosen if number >= count]:
        raise BlocksError(
            f"no block {', '.join(absent[:4])}{' and more' if len(absent) > 4 else ''}: the "
            f"{type(module).__name__} has {count}, 0 to {count - 1}."
        )
    prefixes = tuple(f"{blocks}.{number}." for number in chosen)
    return [name for name in linear if name.startswith(prefixes)]


def _check_same_modules(found: Mapping[str, Shape], wanted: Mapping[str, Shape], where: str) -> None:
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    if missing or extra:
        parts = [f"lacks {len(missing)} of {len(wanted)} targets: {listed(missing)}"] if missing else []
        parts += [f"has {len(extra)} modules that are no targets: {listed(extra)}"] if extra else []
        raise FormatError(
            f"{where}: {', and '.join(parts)}. Let adapter.targets and adapter.blocks name those of the file."
        )
