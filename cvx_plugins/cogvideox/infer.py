"""Which model a set of tensors is, from names and shapes, and from tables that tell what shapes do not.

No torch but to read such a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cvx_core.interfaces import Inferred, Tensors
from cvx_plugins.cogvideox.names import FREQUENCIES, POSITIONS

if TYPE_CHECKING:
    from torch import Tensor

SCALES = (1.875, 1.0)
"""Usual divisors of rows and columns in a fixed table; half precision does not give them exactly."""

Fields = dict[str, Any]
Shape = tuple[int, ...]


def predictor(tensors: Tensors) -> Inferred | None:
    """Return the fields of the CogVideoX transformer that these are the weights of; None if they are not."""
    shape = {name: info.shape for name, info in tensors.index.items()}
    needed = [f"{name}.weight" for name in ("patch_embed.proj", "patch_embed.text_proj", "proj_out")]
    needed += ["time_embedding.linear_2.weight", "transformer_blocks.0.attn1.norm_q.weight"]
    if any(name not in shape for name in needed):
        return None
    embed, text, output, time, head = (shape[name] for name in needed)
    if len(embed) not in (2, 4) or embed[0] % head[0]:
        return None
    fields: Fields = {
        "num_layers": 1
        + max(int(name.split(".")[1]) for name in shape if name.startswith("transformer_blocks.")),
        "num_heads": embed[0] // head[0],
        "head_dim": head[0],
        "text_dim": text[1],
        "temb_dim": time[0],
        **_channels(embed, output[0]),
    }
    if "ofs_embedding.linear_1.weight" in shape:
        fields["ofs_dim"] = shape["ofs_embedding.linear_1.weight"][1]
    found = _positions(fields, tensors)
    return Inferred({**fields, **found.fields}, found.assumed, found.unknown)


def _channels(embed: Shape, output: int) -> Fields:
    """Return what the patch embedding tells: a convolution in 1.0, a linear layer on 2x2x2 patches in 1.5."""
    if len(embed) == 4:
        channels = max(output // embed[2] ** 2, 1)
        return {
            "patch": embed[2],
            "patch_t": None,
            "latent_channels": channels,
            "image_condition": embed[1] == 2 * channels,
        }
    return {
        "patch": 2,
        "patch_t": 2,
        "latent_channels": max(output // 8, 1),
        "image_condition": embed[1] == 2 * output,
    }


def _positions(fields: Fields, tensors: Tensors) -> Inferred:
    size = "which only a config.json states; it bounds positions and changes no weight"
    if fields["patch_t"] is not None:
        grid = {"sample_height": 300, "sample_width": 300, "sample_frames": 81, "text_length": 224}
        return Inferred(
            {"positions": "rotary", "rope_grid": "crop"},
            {name: (value, size) for name, value in grid.items()},
        )
    turned = _rotary_grid(fields, tensors)
    if POSITIONS in tensors.index:
        rows = tensors.index[POSITIONS].shape[1]
        if not fields["image_condition"]:
            return Inferred(_fixed_grid(fields, tensors.load(POSITIONS)[0]))
        return _learned(fields, rows, turned)
    if turned is not None:
        assumed = {"text_length": (226, size)}
        return Inferred({"positions": "rotary", "rope_grid": "resize", **turned}, assumed)
    grid = {"sample_height": 60, "sample_width": 90, "sample_frames": 49, "text_length": 226}
    why = "fixed or rotary: 1.0 text-to-video weights without their tables do not tell"
    return Inferred({}, {name: (value, size) for name, value in grid.items()}, {"positions": why})


def _learned(fields: Fields, rows: int, turned: Fields | None) -> Inferred:
    """Return the fields of a learned table; without rotary tables only its number of rows is known."""
    kind: Fields = {"positions": "rotary+learned", "rope_grid": "resize"}
    if turned is not None:
        return Inferred({**kind, **turned, "text_length": rows - _cells(fields, turned)})
    released = {"sample_height": 60, "sample_width": 90, "sample_frames": 49, "text_length": 226}
    if rows == 226 + 13 * 30 * 45 and fields["patch"] == 2:
        return Inferred({**kind, **released})
    why = f"a learned table of {rows} rows is not divided into text, frames, rows and columns"
    one_cell = {"sample_height": fields["patch"], "sample_width": fields["patch"], "sample_frames": 1}
    return Inferred({**kind, **one_cell, "text_length": rows - 1}, {}, dict.fromkeys(released, why))


def _cells(fields: Fields, grid: Fields) -> int:
    patch = fields["patch"]
    frames = (grid["sample_frames"] - 1) // 4 + 1
    return int(frames * (grid["sample_height"] // patch) * (grid["sample_width"] // patch))


def _rotary_grid(fields: Fields, tensors: Tensors) -> Fields | None:
    """Return the sample size that rotary tables were made for, read off where their angles start again."""
    cos = FREQUENCIES[1]
    if cos not in tensors.index or tensors.index[cos].shape[-1] != fields["head_dim"]:
        return None
    table = tensors.load(cos).reshape(-1, fields["head_dim"])
    quarter = fields["head_dim"] // 4
    plane = _run(table[:, :quarter])
    columns = _run(table[:plane, quarter : quarter + fields["head_dim"] // 8 * 3])
    return _size(fields, len(table) // plane, plane // columns, columns)


def _fixed_grid(fields: Fields, table: Tensor) -> Fields:
    """Return what a fixed table was made for: text rows are zero; then time, columns and rows."""
    text = int((table != 0).any(dim=1).nonzero()[0])
    cells, quarter, rest = table[text:], table.shape[1] // 4, table.shape[1] // 8 * 3
    plane = _run(cells[:, :quarter])
    columns = _run(cells[:plane, quarter + rest :])
    found = {"positions": "sincos", "text_length": text}
    found |= _size(fields, len(cells) // plane, plane // columns, columns)
    if columns > 1:
        scale = 1 / math.asin(float(cells[1, quarter]))
        near = next((known for known in SCALES if abs(scale / known - 1) < 0.01), None)
        found["spatial_interpolation_scale"] = near or round(scale, 4)
    return found


def _run(rows: Tensor) -> int:
    """Return how often the first row comes before another does."""
    other = (rows != rows[0]).any(dim=1).nonzero()
    return int(other[0]) if len(other) else len(rows)


def _size(fields: Fields, frames: int, rows: int, columns: int) -> Fields:
    return {
        "sample_frames": 4 * (frames - 1) + 1,
        "sample_height": rows * fields["patch"],
        "sample_width": columns * fields["patch"],
    }


def autoencoder(tensors: Tensors) -> Inferred | None:
    """Return the fields of the CogVideoX autoencoder that these are the weights of; None if they are not."""
    shape = {name: info.shape for name, info in tensors.index.items()}
    first, last, latent = (
        "encoder.conv_in.conv.weight",
        "decoder.conv_out.conv.weight",
        "decoder.conv_in.conv.weight",
    )
    if any(name not in shape or len(shape[name]) != 5 for name in (first, last, latent)):
        return None
    widths = _level_widths(shape)
    if not widths:
        return None
    base = math.gcd(*widths)
    blocks = sum(
        name.startswith("encoder.down_blocks.0.resnets.") and name.endswith("conv1.conv.weight")
        for name in shape
    )
    fields: Fields = {
        "in_channels": shape[first][1],
        "out_channels": shape[last][0],
        "latent_channels": shape[latent][1],
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in widths),
        "blocks_per_level": blocks,
    }
    why = "of the 5B and 1.5 models; that of 2B is 1.15258426, and files without config.json do not tell"
    return Inferred(fields, {"scale_factor": (0.7, why)})


def _level_widths(shape: Mapping[str, Shape]) -> list[int]:
    widths: list[int] = []
    while (name := f"encoder.down_blocks.{len(widths)}.resnets.0.conv2.conv.weight") in shape:
        widths.append(shape[name][0])
    return widths
