"""A LoRA on all kinds of linear layers, with ranks and alphas that differ, and the formats under test."""

import pytest
import torch

from cvx_core import Registry
from cvx_core.testing.format import as_tensors

LAYERS = {
    "transformer_blocks.0.attn1.to_q": (4, 8.0, 12, 12),
    "transformer_blocks.0.attn1.to_out.0": (4, 8.0, 12, 12),
    "transformer_blocks.1.attn1.to_q": (2, 0.1, 12, 12),
    "transformer_blocks.1.ff.net.0.proj": (3, 8.0, 12, 48),
    "transformer_blocks.11.norm1.linear": (4, 1.5, 5, 72),
    "time_embedding.linear_1": (4, 8.0, 12, 5),
    "proj_out": (1, 1e-3, 12, 16),
}
"""{module: (rank, alpha, inputs, outputs)}."""


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, (module, (rank, alpha, inputs, outputs)) in enumerate(LAYERS.items()):
        dtype = torch.bfloat16 if number == 2 else torch.float32
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator).to(dtype)
        tensors[f"{module}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator).to(dtype)
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.fixture
def lora(state):
    return as_tensors(state)


@pytest.fixture(scope="session")
def make():
    """Return the format of a name."""
    registry = Registry.discover()

    def made(name):
        component = registry.get("format", name)
        return component.load()(component.config(**component.preset), None)

    return made


@pytest.fixture(scope="session")
def accepting():
    """Return the names of all formats that take a path for theirs."""
    registry = Registry.discover()

    def names(path):
        formats = ((c.name, c.load()(c.config(**c.preset), None)) for c, _ in registry.all("format"))
        return [name for name, made in formats if made.accepts(path)]

    return names
