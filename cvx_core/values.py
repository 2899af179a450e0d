"""The values that travel between components.

Shape letters: B batch; C latent channels; F H W pixel frames, height, width; T h w latent frames, height,
width; S video tokens; L text tokens; D width; E time-embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from cvx_core.errors import FormatError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from cvx_core.random import Draws


@dataclass(frozen=True)
class Row:
    """One item of a dataset, by reference. Paths are absolute.

    id: unique in the dataset; captions: at least one unless the dataset has none; video, image: files or
    None; make: draws the video of a synthetic row, (F,H,W,3) uint8, from (frames, height, width); features:
    reads what an encoder made of the row, called with a caption; such a row needs none of these.
    """

    id: str
    captions: tuple[str, ...] = ()
    video: Path | None = None
    image: Path | None = None
    make: Callable[[int, int, int], Any] | None = None
    features: Callable[[str], Any] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


class Batch(NamedTuple):
    """Rows with their pixels. video (B,3,F,H,W) float32 in [-1,1]; image (B,3,H,W) likewise; each may be
    absent. encoded: what rows from a cache of features have instead, one value a row.
    """

    rows: tuple[Row, ...]
    prompts: tuple[str, ...]
    video: Tensor | None = None
    image: Tensor | None = None
    encoded: tuple[Any, ...] | None = None


class Work(NamedTuple):
    """A batch on its way to a training step. cursor: where the data goes on after it."""

    cursor: Any
    batch: Batch
    draws: Draws
    features: Features | None = None


class Features(NamedTuple):
    """What the predictor trains on. latent, image_latent (B,C,T,h,w) scaled; text_embeds (B,L,D); text_mask
    (B,L).
    """

    latent: Tensor
    text_embeds: Tensor
    text_mask: Tensor
    image_latent: Tensor | None = None


class Condition(NamedTuple):
    """What a prediction is conditioned on; shapes as in Features."""

    text_embeds: Tensor
    text_mask: Tensor
    image_latent: Tensor | None = None


class Tokens(NamedTuple):
    """What runs through a predictor's blocks.

    video (B,S,D); text (B,L,D); temb (B,E); rope: (cos, sin), each (S,K) float32, or None; grid: (T,h,w) in
    patches.
    """

    video: Tensor
    text: Tensor
    temb: Tensor
    rope: tuple[Tensor, Tensor] | None
    grid: tuple[int, int, int]


class Noised(NamedTuple):
    """What a predictor is given, and what it should return: noisy, target (B,C,T,h,w); timestep (B,)."""

    noisy: Tensor
    timestep: Tensor
    condition: Condition
    target: Tensor


class TensorInfo(NamedTuple):
    """Shape and dtype name (as in torch, e.g. "float32") of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Tensors:
    """Named tensors whose shapes are known before any is read, and that can be read in any order.

    index: {name: shape and dtype}, in the order that is quickest to read; load: returns one tensor on the
    CPU, which the caller must not change; dropped: {name in the file: why it was left out}; origins: {name:
    names in the file it is made of} where they differ; facts: what the files state besides tensors.
    """

    index: Mapping[str, TensorInfo]
    load: Callable[[str], Tensor]
    dropped: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, Sequence[str]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors one at a time, all of them or those named. Raises FormatError on an unknown name."""
        for name in self.index if names is None else names:
            if name not in self.index:
                raise FormatError(f"no tensor {name!r}.{did_you_mean(name, self.index)}")
            yield name, self.load(name)


class Inferred(NamedTuple):
    """What tensors tell about the model they are the weights of.

    fields: config fields that follow from them; assumed: {field: (value, what it is)}, usual values of what
    they leave open, which change no weight; unknown: {field: why} that has to be stated before anything can
    be written that depends on it.
    """

    fields: Mapping[str, Any]
    assumed: Mapping[str, tuple[Any, str]] = MappingProxyType({})
    unknown: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Plan:
    """A predictor's structure as data; every strategy reads it, so no model knows how it is parallelised.

    blocks: name of the ModuleDict of blocks; attend: patterns of the modules with an `attend` slot; column,
    row: patterns of linear layers whose outputs or inputs are split over tensor-parallel ranks; lora: default
    targets; head: modules that `head` uses, all others outside the blocks being those of `embed`;
    row_widths: inputs of the layers that each pattern of row names, () where the config does not know. A
    pattern is an FQN with * for one component.
    """

    blocks: str
    num_heads: int
    attend: tuple[str, ...] = ()
    column: tuple[str, ...] = ()
    row: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    row_widths: tuple[int, ...] = ()


class ParamGroup(NamedTuple):
    """Named parameters that share optimizer settings."""

    params: Sequence[tuple[str, Tensor]]
    options: dict[str, Any]


class Piece(NamedTuple):
    """One part of a model on its way to disk. tokenizer: the folder of a text encoder's tokenizer."""

    config: Mapping[str, Any]
    tensors: Tensors | None = None
    tokenizer: Path | None = None
