"""Reading a conversion again: every tensor bit for bit, and the model where it is small enough to run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvx_core.errors import FormatError
from cvx_core.interfaces import Condition, Deps, Tensors
from cvx_io.conversion.detect import Model
from cvx_io.progress import progress
from cvx_io.regroup import listed
from cvx_io.tensors.dtypes import num_bytes

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 200_000_000
"""Most bytes of a model that is run."""


def verify(written: Tensors, expected: Tensors, model: Model, where: Path) -> list[str]:
    """Compare what was written with what should have been. Returns what was checked.

    Raises FormatError naming the first tensor that differs.
    """
    if written.index != expected.index:
        different = [name for name in expected.index if written.index.get(name) != expected.index[name]]
        extra = sorted(written.index.keys() - expected.index.keys())
        raise FormatError(
            f"{where}: not written as planned: {listed(different + extra)} differ in name, shape or dtype."
        )
    total = sum(num_bytes(info) for info in expected.index.values())
    with progress("verify", total, in_bytes=True) as bar:
        for name, info in expected.index.items():
            if not identical(written.load(name), expected.load(name)):
                raise FormatError(
                    f"{where}: {name!r} differs from the source. Is the disk faulty? Convert again."
                )
            bar.step(by=num_bytes(info))
    checked = [f"{len(expected.index)} tensors read again, bit for bit equal"]
    if model.component is not None and model.component.kind == "predictor" and total <= SMALL:
        ours, theirs = _forward(written, model), _forward(expected, model)
        if not identical(ours, theirs):
            raise FormatError(f"{where}: the model gives another output than with the source's weights.")
        checked.append("a forward pass with both, bit for bit equal")
    return checked


def identical(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors have the same bits; NaN equals itself."""
    import torch

    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    flat = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)


def _forward(tensors: Tensors, model: Model) -> Tensor:
    """Return the prediction, float32, of one small made-up input."""
    import torch

    assert model.component is not None
    with torch.device("meta"):
        module: Any = model.component.load()(model.config, Deps())
    module.to_empty(device="cpu").float()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors.load(name))
        latent, cond = _example(model.config)
        output: Tensor = module(latent, torch.tensor([500]), cond)
    return output


def _example(config: Any) -> tuple[Tensor, Condition]:
    import torch

    card = config.rules()
    generator = torch.Generator().manual_seed(0)
    height, width = card.sizes[0] if card.sizes else (2 * card.size_step, 2 * card.size_step)
    shape = (1, config.latent_channels, card.patch_t or 1, height // 8, width // 8)
    latent = torch.randn(shape, generator=generator)
    text = torch.randn((1, config.text_length, config.text_dim), generator=generator)
    image = torch.zeros(shape) if config.image_condition else None
    return latent, Condition(text, torch.ones(1, config.text_length, dtype=torch.bool), image)
