"""Steps of torchao's 8-bit AdamW, kept in torchao_8bit.safetensors beside this file.

torchao is not installed for the tests: transformers imports it wherever it is there, which takes longer than
most tests do. With it installed, `python -m tests.plugins.optimizers.reference_8bit` writes the file anew.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

FILE = Path(__file__).parent / "torchao_8bit.safetensors"
SHAPE, STEPS = (8, 512), 4
SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def numbers(key: int) -> Tensor:
    """Return made-up values of either sign, from 0.05 to 1 away from 0. SHAPE, float32."""
    places = torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.int64) + 1 + key * 100_003
    mixed = places * 2654435761 % 2**32
    size = 0.05 + 0.95 * (mixed % 65536).double() / 65536
    return (size * ((mixed >> 20) % 2 * 2 - 1)).float().view(SHAPE)


def main() -> None:
    """Write the file."""
    from safetensors.torch import save_file
    from torchao.optim import AdamW8bit

    torch.compiler.set_stance("force_eager")
    weight = torch.nn.Parameter(numbers(0))
    optimizer = AdamW8bit([weight], **SETTINGS)
    for step in range(STEPS):
        weight.grad = numbers(step + 1)
        optimizer.step()
    state = optimizer.state[weight]
    tensors = {"weight": weight.detach(), "levels_signed": state["exp_avg"].qmap}
    tensors["levels"] = state["exp_avg_sq"].qmap
    for key in ("exp_avg", "exp_avg_sq"):
        tensors |= {f"{key}_codes": state[key].codes, f"{key}_scale": state[key].scale}
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, FILE)


if __name__ == "__main__":
    main()
