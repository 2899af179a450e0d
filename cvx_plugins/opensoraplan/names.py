"""What MindSpeed-MM calls the tensors of OpenSoraPlan 1.2, how it splits them. Our names are the release's.

With no model to compare with, the tables say themselves what is missing. The transformer's names are also
those of version 1.3 and of PixArt, which MindSpeed-MM does not load from this layout. Sources:
PKU-YuanGroup/Open-Sora-Plan opensora/models, MindSpeed-MM examples/opensoraplan1.2/convert_ckpt_to_mm.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from cvx_core import Component, FormatError
from cvx_io.regroup import Renaming, at, listed
from cvx_io.rename import Drop, Names, Rename

BLOCK = "transformer_blocks.{i}"
_NUMBER = re.compile(r"transformer_blocks\.(\d+)\.")
_TOP_LAYERS = (
    "pos_embed.proj",
    "adaln_single.emb.timestep_embedder.linear_1",
    "adaln_single.emb.timestep_embedder.linear_2",
    "adaln_single.linear",
    "caption_projection.linear_1",
    "caption_projection.linear_2",
    "proj_out",
)
TOP = ("scale_shift_table", *(f"{layer}.{p}" for layer in _TOP_LAYERS for p in ("weight", "bias")))
"""The tensors outside blocks."""


@dataclass(frozen=True)
class Transformer(Names):
    """A table of the transformer, which refuses to read a part of it, such as one of several shards."""

    def plan(self, foreign: Iterable[str], where: str = "") -> Renaming:
        """Match names as any table does. Raises FormatError too where tensors are missing."""
        renaming = super().plan(foreign, where)
        if missing := _missing({target for step in renaming.steps for target in step.targets}):
            raise FormatError(
                f"{at(where)}lacks {len(missing)} tensors of OpenSoraPlan: {listed(missing)}. Is it one of "
                "several shards? Give their folder or their index file."
            )
        return renaming


def _missing(names: set[str]) -> list[str]:
    """Return the tensors that are not there: outside blocks, and in a block what any other block has."""
    blocks: dict[int, set[str]] = {}
    for name in names:
        if found := _NUMBER.match(name):
            blocks.setdefault(int(found[1]), set()).add(name[found.end() :])
    each = sorted(set().union(*blocks.values()))
    expected = [f"transformer_blocks.{i}.{rest}" for i in range(max(blocks, default=0) + 1) for rest in each]
    return [name for name in (*TOP, *expected) if name not in names]


_MM = "videodit_blocks.{i}"

MEGATRON = Transformer(
    rules=(
        Drop("{rest}._extra_state", "state of a module, no weight"),
        *(Rename(name, name) for name in TOP),
        Rename(f"{_MM}.scale_shift_table", f"{BLOCK}.scale_shift_table"),
        *(
            rule
            for theirs, ours in (
                (f"{_MM}.self_atten", f"{BLOCK}.attn1"),
                (f"{_MM}.cross_atten", f"{BLOCK}.attn2"),
            )
            for rule in (
                *(Rename(f"{theirs}.proj_{x}.{{p}}", f"{ours}.to_{x}.{{p}}", tp="column") for x in "qkv"),
                Rename(f"{theirs}.proj_out.weight", f"{ours}.to_out.0.weight", tp="row"),
                Rename(f"{theirs}.proj_out.bias", f"{ours}.to_out.0.bias"),
            )
        ),
        Rename(f"{_MM}.ff.net.0.proj.{{p}}", f"{BLOCK}.ff.net.0.proj.{{p}}", tp="column"),
        Rename(f"{_MM}.ff.net.2.weight", f"{BLOCK}.ff.net.2.weight", tp="row"),
        Rename(f"{_MM}.ff.net.2.bias", f"{BLOCK}.ff.net.2.bias"),
    ),
)

CANONICAL = Transformer(
    rules=[Rename(rule.canonical, rule.canonical) for rule in MEGATRON.rules if isinstance(rule, Rename)]
)
"""Changes nothing; its rules tell which files are of this family."""

_LAYERS = ("{layer}.{p}", "{layer}.conv.{p}")
"""A layer over frames, or one over time too, which wraps its convolution."""
_ENDS = ("conv_in.{p}", "conv_in.conv.{p}", "norm_out.{p}", "conv_out.{p}", "conv_out.conv.{p}")

VAE = Names(
    rules=(
        Drop("loss.{rest}", "weights of the loss it was trained with"),
        *(
            Rename(name, name)
            for name in (
                "quant_conv.conv.{p}",
                "post_quant_conv.conv.{p}",
                *(f"{half}.{end}" for half in ("encoder", "decoder") for end in _ENDS),
                *(f"{half}.mid.{{block}}.{x}" for half in ("encoder", "decoder") for x in _LAYERS),
                *(
                    f"{level}.{part}"
                    for level in ("encoder.down.{i}", "decoder.up.{i}")
                    for part in (
                        *(f"{kind}.{{j}}.{x}" for kind in ("block", "attn") for x in _LAYERS),
                        *(f"{{resample}}.{x}" for x in ("conv.{p}", "conv.conv.{p}", "mix_factor")),
                    )
                ),
            )
        ),
    )
)
"""The autoencoder's names are the same everywhere; MindSpeed-MM loads them from one .pt without a wrapper."""


def names_components() -> Iterable[Component]:
    """Yield the tables."""
    here = "cvx_plugins.opensoraplan.names:"
    yield Component("names", "opensoraplan:megatron", None, f"{here}MEGATRON")
    for owner in ("hf", "dcp", "ckpt"):
        yield Component("names", f"opensoraplan:{owner}", None, f"{here}CANONICAL")
    for owner in ("megatron", "hf", "dcp", "ckpt"):
        yield Component("names", f"opensoraplan-vae:{owner}", None, f"{here}VAE")
