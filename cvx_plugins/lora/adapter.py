"""The LoRA adapter: linear layers that add a low-rank product, in place and under the names they had."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvx_core.errors import CvxError, did_you_mean
from cvx_core.interfaces import Deps
from cvx_core.placing import default_initial
from cvx_io.lora import A, B
from cvx_plugins.lora.adapter_config import LoraConfig


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
        self.cfg, self._patterns = cfg, cfg.patterns(deps.spec)

    def apply(self, predictor: nn.Module) -> list[str]:
        """Change the predictor in place; return the names of A and B. Raises CvxError on useless targets."""
        predictor.requires_grad_(False)
        added = []
        for name in targets(predictor, self._patterns):
            adapt(predictor.get_submodule(name), self.cfg)
            added += [f"{name}{A}", f"{name}{B}"]
        return added

    @staticmethod
    def initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return A uniform in +-1/sqrt(in), as PEFT draws it, and B zero: the model starts unchanged."""
        return torch.zeros(shape) if name.endswith(B) else default_initial(name, shape, generator)


def adapt(layer: nn.Module, cfg: LoraConfig) -> None:
    """Turn a linear layer into an adapted one, with factors on its device and in its dtype."""
    assert isinstance(layer, nn.Linear)
    like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    layer.__class__ = AdaptedLinear
    assert isinstance(layer, AdaptedLinear)
    layer.lora_A = nn.Linear(layer.in_features, cfg.rank, bias=False, **like)
    layer.lora_B = nn.Linear(cfg.rank, layer.out_features, bias=False, **like)
    layer.scale, layer.dropout = cfg.alpha / cfg.rank, cfg.dropout


def targets(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the linear layers that patterns match, in the order of the module.

    Raises CvxError on a pattern that matches none, and where there is no pattern.
    """
    if not patterns:
        raise CvxError(f"a {type(module).__name__} names no layers for LoRA. List some in adapter.targets.")
    linear = [name for name, part in module.named_modules() if type(part) is nn.Linear]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in linear):
            length = pattern.count(".") + 1
            ends = {".".join(name.split(".")[-length:]) for name in linear}
            hint = did_you_mean(pattern, sorted(ends)) or f" They end in {', '.join(sorted(ends))}."
            raise CvxError(f"{pattern!r} matches no linear layer of the {type(module).__name__}.{hint}")
    return [name for name in linear if any(matches(name, pattern) for pattern in patterns)]


def matches(name: str, pattern: str) -> bool:
    """Tell whether the last components of a name are those of a pattern."""
    wanted = pattern.split(".")
    found = name.split(".")[-len(wanted) :]
    return len(found) == len(wanted) and all(map(fnmatchcase, found, wanted))
