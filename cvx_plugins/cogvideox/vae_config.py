"""Config of the CogVideoX autoencoder, and its translation to and from the Diffusers config of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cvx_core import Component, Config, FormatError
from cvx_core.config import Positive
from cvx_core.interfaces import Inferred, Tensors
from cvx_plugins.cogvideox import infer

Overlap = Annotated[float, Field(ge=0.0, lt=1.0)]

FOREIGN_CLASS = "AutoencoderKLCogVideoX"
_UNSUPPORTED = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "norm_eps": 1e-6,
    "shift_factor": None,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
"""Foreign fields that this model has one value for."""


class Tile(Config):
    """Spatial tiles: a clip larger than one tile is coded piece by piece, and the overlaps are blended."""

    height: Positive = 240
    """Pixel rows of a tile; a multiple of the spatial compression."""
    width: Positive = 360
    """Pixel columns of a tile; a multiple of the spatial compression."""
    overlap: Overlap | tuple[Overlap, Overlap] = (1 / 6, 1 / 5)
    """Share of a tile that its neighbour covers too, or one share for rows and one for columns.

    Rounded down to whole latent pixels.
    """

    def in_latent(self, compression: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (height, width) and (rows, columns of overlap) in latent pixels."""
        size = (self.height // compression, self.width // compression)
        shares = self.overlap if isinstance(self.overlap, tuple) else (self.overlap, self.overlap)
        # The small term keeps a share such as 0.2 * 45, which floating point puts below 9, at 9.
        rows, columns = (int(n * share + 1e-9) for n, share in zip(size, shares, strict=True))
        return size, (rows, columns)


class CogVideoXVAEConfig(Config):
    """3D causal autoencoder of CogVideoX. The defaults are the released model, run as Diffusers runs it."""

    family: ClassVar[str] = "cogvideox-vae"
    in_chunks: ClassVar[bool] = True  # a clip can be coded by several ranks
    beside_encoding: ClassVar[tuple[str, ...]] = (  # fields that change no moments
        "out_channels",
        "scale_factor",
        "invert_scale_latents",
        "decode",
        "decode_chunk",
        "decode_first_frame",
        "slicing",
    )

    in_channels: Positive = 3
    """Channels of the video that is encoded."""
    out_channels: Positive = 3
    """Channels of the video that is decoded."""
    latent_channels: Positive = 16
    """Channels of a latent."""
    base_channels: Positive = 128
    """Width that `channel_multipliers` multiply."""
    channel_multipliers: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 2, 4)
    """Width of each level, full resolution first; every level but the last halves height and width."""
    blocks_per_level: Positive = 3
    """Residual blocks of an encoder level; the decoder has one more."""
    temporal_compression: Positive = 4
    """Frames per latent frame, a power of two: each of the first levels halves time until it is reached."""
    norm_groups: Positive | None = None
    """Groups of the group norms; must divide every width. None: 32, lowered to what divides every width."""
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-6
    """Added to the variance in group norms."""
    scale_factor: Annotated[float, Field(gt=0.0)] = 0.7
    """A latent is multiplied by this after encoding and divided by it before decoding."""
    invert_scale_latents: bool = False
    """Only read from and written to files: the predictor's card rules how an image condition is scaled."""

    encode: Literal["chunked", "whole"] = "chunked"
    """chunked: `encode_chunk` frames at a time, the remainder in the first chunk; whole: in one pass, whose
    convolutions go frame by frame, so that several devices that share a clip give the same bits.

    They differ: statistics of the group norms are taken per pass.
    """
    encode_chunk: Positive = 8
    """Frames of an encoding chunk."""
    encode_first_frame: Literal["odd", "alone"] = "odd"
    """Time pooling. odd: frame 0 stays out of it where the count is odd; alone: in every clip (1.5 code)."""
    decode: Literal["chunked", "whole", "balanced"] = "chunked"
    """chunked: `decode_chunk` latent frames at a time, the remainder in the first chunk; whole: one pass;
    balanced: at most ten chunks of two or more frames, as equal as can be (1.5 code)."""
    decode_chunk: Positive = 2
    """Latent frames of a decoding chunk."""
    decode_first_frame: Literal["odd", "alone", "paired"] = "odd"
    """Time upsampling. odd: a chunk of T latent frames gives 4 (T-1) + 1 frames where T is odd, else 4 T;
    alone: the whole clip gives 4 (T-1) + 1; paired: it gives 4 T (public 1.5 code)."""
    slicing: bool = False
    """Code the samples of a batch one at a time, to save memory."""
    tile: Tile | None = None
    """Spatial tiles; None codes whole frames."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, full resolution first."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def in_one_pass(self) -> tuple[str, ...]:
        """The fields that have a clip coded in one pass, so that norms look at all of its frames."""
        return tuple(name for name in ("encode", "decode") if getattr(self, name) == "whole")

    @property
    def groups(self) -> int:
        """Groups of the group norms."""
        return self.norm_groups or math.gcd(32, *self.widths)

    @property
    def compression(self) -> tuple[int, int, int]:
        """Frames, pixel rows and pixel columns per latent element."""
        spatial = 2 ** (len(self.channel_multipliers) - 1)
        return self.temporal_compression, spatial, spatial

    @property
    def temporal_levels(self) -> int:
        """How many levels halve time."""
        return self.temporal_compression.bit_length() - 1

    @model_validator(mode="after")
    def _fits(self) -> CogVideoXVAEConfig:
        uneven = [width for width in self.widths if width % self.groups]
        if uneven:
            raise ValueError(f"norm_groups {self.groups} does not divide widths {uneven}; leave it out")
        frames, rows, columns = self.compression
        if frames.bit_count() != 1 or frames > rows:
            raise ValueError(f"temporal_compression {frames} must be a power of two up to {rows}")
        for name, step in (("height", rows), ("width", columns)):
            size = getattr(self.tile, name, step)
            if size % step:
                near = " or ".join(str(n) for n in (size // step * step, (size // step + 1) * step) if n)
                raise ValueError(f"tile.{name} {size} must be a multiple of {step}; nearest: {near}")
        return self

    @classmethod
    def recognise(cls, foreign: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the recipe fields of a Diffusers config of this model; None where it describes another one.

        Raises FormatError where it asks for something this model has not.
        """
        if foreign.get("_class_name") != FOREIGN_CLASS:
            return None
        for key, only in _UNSUPPORTED.items():
            if foreign.get(key, only) != only:
                raise FormatError(f"{FOREIGN_CLASS} config: {key} is {foreign[key]!r}; expected {only!r}")
        widths = [int(width) for width in foreign.get("block_out_channels", cls().widths)]
        base = math.gcd(*widths)
        fields = {ours: foreign[theirs] for ours, theirs in _SAME.items() if theirs in foreign}
        fields["base_channels"] = base
        fields["channel_multipliers"] = tuple(width // base for width in widths)
        fields.setdefault("scale_factor", 1.15258426)
        fields["temporal_compression"] = int(fields.get("temporal_compression", 4))
        return {"use": cls.family, **fields, **foreign.get("_cvx", {})}

    @classmethod
    def infer(cls, tensors: Tensors) -> Inferred | None:
        """Return the fields, with `use`, of the model these are the weights of; None if they are not ours."""
        found = infer.autoencoder(tensors)
        return found and found._replace(fields={"use": cls.family, **found.fields})

    def describe(self) -> Mapping[str, Any]:
        """Return the Diffusers config of this model. Raises FormatError where Diffusers cannot express it."""
        if self.norm_eps != _UNSUPPORTED["norm_eps"]:
            raise FormatError(
                f"autoencoder.norm_eps is {self.norm_eps}; a Diffusers config can only express 1e-6"
            )
        levels = len(self.widths)
        return {
            "_class_name": FOREIGN_CLASS,
            **_UNSUPPORTED,
            **{theirs: getattr(self, ours) for ours, theirs in _SAME.items()},
            "norm_num_groups": self.groups,
            "block_out_channels": list(self.widths),
            "down_block_types": ["CogVideoXDownBlock3D"] * levels,
            "up_block_types": ["CogVideoXUpBlock3D"] * levels,
            "sample_height": 2 * self.tile.height if self.tile else 480,
            "sample_width": 2 * self.tile.width if self.tile else 720,
            "_cvx": {name: getattr(self, name) for name in _UNSPOKEN},
        }


_UNSPOKEN = (
    "encode",
    "encode_chunk",
    "encode_first_frame",
    "decode",
    "decode_chunk",
    "decode_first_frame",
)
"""Fields that Diffusers has no key for; it skips keys that begin with an underscore."""

_SAME = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "latent_channels": "latent_channels",
    "blocks_per_level": "layers_per_block",
    "norm_groups": "norm_num_groups",
    "temporal_compression": "temporal_compression_ratio",
    "scale_factor": "scaling_factor",
    "invert_scale_latents": "invert_scale_latents",
}
"""Fields that only differ in name."""


def autoencoder_components() -> Iterable[Component]:
    """Yield the autoencoder that all released variants share."""
    yield Component(
        kind="autoencoder",
        name="cogvideox-vae",
        config=CogVideoXVAEConfig,
        target="cvx_plugins.cogvideox.vae:build",
        summary="3D causal autoencoder: 4x in time, 8x in space, 16 channels",
    )
