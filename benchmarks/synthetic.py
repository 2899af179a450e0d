"""A made-up checkpoint of a released transformer: its shapes, random bits, every tensor drawn from its name.

So a checkpoint of any size is written and checked with one tensor in memory, and needs no download.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvx_core.interfaces import TensorInfo, Tensors
from cvx_core.random import keyed
from cvx_core.registry import Registry
from cvx_core.testing.names import parameter_shapes
from cvx_io.rename import Names
from cvx_io.tensors.archive import torch_archive

DTYPE = "bfloat16"
BELOW_TWO = ~0x4000
"""Clears the exponent's top bit of a bfloat16, so that any bits are a finite number, of magnitude below 2."""
TABLES = ("pos_embed.freqs_sin", "pos_embed.freqs_cos")
"""Rotary tables, which files may hold although the model computes them."""


@dataclass(frozen=True)
class Model:
    """A released transformer, by preset; fields: what to change of it, such as the number of layers."""

    preset: str
    fields: Mapping[str, Any]

    @cached_property
    def config(self) -> Any:
        component = Registry.discover().get("predictor", self.preset)
        assert component.config is not None
        return component.config(**{**component.preset, **self.fields})

    @cached_property
    def tensors(self) -> Tensors:
        """Return every parameter under its canonical name; each is drawn when it is loaded."""
        shapes = parameter_shapes("predictor", self.preset, self.fields)
        return drawn({name: TensorInfo(shape, DTYPE) for name, shape in shapes.items()})

    def sat(self) -> Tensors:
        """Return what a SAT release holds: parameters and rotary tables, under its names, in its order."""
        table: Names = Registry.discover().get("names", f"{self.config.family}:sat").load()
        rows = math.prod(self.config.sample_grid)
        tables = dict.fromkeys(TABLES, TensorInfo((rows, self.config.head_dim), DTYPE))
        named = table.write(drawn({**tables, **self.tensors.index}))
        # Sorting is stable: `mixins`, then `time_embed`, then `transformer`, so a block lies in two places.
        order = sorted(named.index, key=lambda name: name.removeprefix(table.prefix).split(".")[0])
        return replace(named, index={name: named.index[name] for name in order})

    def write_sat(self, folder: Path) -> Path:
        """Write a SAT folder, one tensor at a time; return its weight file."""
        file = folder / "1" / "mp_rank_00_model_states.pt"
        file.parent.mkdir(parents=True)
        source = self.sat()
        with torch_archive(file, source.index, wrap=lambda state: {"module": state}) as archive:
            for name, tensor in source.read():
                archive.write(name, [tensor])
        (folder / "latest").write_text("1", encoding="utf-8")
        return file

    def differences(self, found: Tensors) -> list[str]:
        """Return the canonical names that are missing, not expected, or not the same to the last bit."""
        wanted = self.tensors.index
        names = [name for name in {**found.index, **wanted} if name not in TABLES]
        return [
            name
            for name in names
            if found.index.get(name) != wanted.get(name)
            or not torch.equal(_bits(found.load(name)), _bits(self.tensors.load(name)))
        ]


def drawn(index: Mapping[str, TensorInfo]) -> Tensors:
    """Return bfloat16 tensors of the shapes in `index`, each drawn from its name when it is loaded."""
    return Tensors(index, lambda name: draw(name, index[name].shape))


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a bfloat16 tensor of random bits that are finite numbers, the same for the same name."""
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(generator=keyed(0, name))
    bits = words.view(torch.int16)[:count].bitwise_and_(BELOW_TWO)
    return bits.view(torch.bfloat16).view(shape)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)
