"""Config of the CogVideoX transformer: hyper-parameters, their rules, and what a recipe has to fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cvx_core import Card, Component, Config, Plan
from cvx_core.config import Positive
from cvx_core.interfaces import Inferred, Tensors
from cvx_plugins.cogvideox import diffusers_config, infer
from cvx_plugins.cogvideox.presets import PRESETS, SUMMARIES

if TYPE_CHECKING:
    from torch import Tensor

TARGET = "cvx_plugins.cogvideox.model:build"
VAE_STRIDE = 8
"""Pixels per latent in height and width."""

Epsilon = Annotated[float, Field(gt=0.0)]


class CogVideoXConfig(Config):
    """Hyper-parameters of one CogVideoX transformer. Bare, it is a small rotary model that takes any size."""

    family: ClassVar[str] = "cogvideox"

    num_layers: Positive = 30
    """Number of transformer blocks."""
    num_heads: Positive = 30
    """Attention heads; the model's width is num_heads * head_dim."""
    head_dim: Positive = 64
    """Width of a head; a multiple of 16 with rotary positions."""
    latent_channels: Positive = 16
    """Channels of a latent, which are also the channels of the prediction."""
    image_condition: bool = False
    """Image to video: the image's latent is embedded with the noisy one, on twice the channels."""
    text_dim: Positive = 4096
    """Width of a text token's embedding."""
    text_length: Positive = 226
    """Number of text tokens."""
    temb_dim: Positive = 512
    """Width of the time embedding."""
    ofs_dim: Positive | None = None
    """Width of the offset embedding (1.5 image to video), equal to temb_dim; None: the model has none."""
    ofs: float = 2.0
    """The offset every prediction is made with."""
    patch: Positive = 2
    """Height and width of a patch, in latents."""
    patch_t: Positive | None = None
    """Latent frames per patch (1.5); None: patches are images and embedded by a convolution (1.0)."""
    positions: Literal["rotary", "sincos", "rotary+learned"] = "rotary"
    """Where position enters: rotations of queries and keys; a fixed table added to the tokens; or rotations
    and a learned table, which fixes height, width and text_length, and bounds the number of frames."""
    rope_grid: Literal["resize", "crop"] = "crop"
    """Rotary positions of a clip: its own patch indices (crop), or those of the sample grid, into which the
    clip is fitted and centred (resize). At the sample size both are the same."""
    sample_height: Positive = 60
    """Height of the sample grid, in latents."""
    sample_width: Positive = 90
    """Width of the sample grid, in latents."""
    sample_frames: Positive = 49
    """Frames of the sample clip, in pixel frames."""
    temporal_compression: Positive = 4
    """Pixel frames per latent frame; gives the number of frames of the learned table."""
    spatial_interpolation_scale: Epsilon = 1.875
    """Divides the rows and columns of the fixed table."""
    temporal_interpolation_scale: Epsilon = 1.0
    """Divides the frames of the fixed table."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of the blocks' norms and of the norm behind them."""
    qk_norm_eps: Epsilon = 1e-6
    """Epsilon of the norms of queries and keys."""
    out_norm_eps: Epsilon = 1e-6
    """Epsilon of the modulated norm before the output. The releases were trained with 1e-6. diffusers has
    1e-5 there, and so has a model read from a diffusers folder; predictions shift by about 2e-5."""
    card: Card = Card()
    """What the model demands of a recipe, where it differs from what follows from the fields above."""

    @property
    def width(self) -> int:
        """D."""
        return self.num_heads * self.head_dim

    @property
    def sample_grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the sample clip, in patches."""
        frames = (self.sample_frames - 1) // self.temporal_compression + 1
        return (
            frames // (self.patch_t or 1),
            self.sample_height // self.patch,
            self.sample_width // self.patch,
        )

    @model_validator(mode="after")
    def _consistent(self) -> CogVideoXConfig:
        if self.positions != "sincos" and self.head_dim % 16:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need a multiple of 16")
        if self.positions == "sincos" and self.width % 16:
            raise ValueError(
                f"num_heads * head_dim is {self.width}; positions: sincos needs a multiple of 16"
            )
        if self.width % 2:
            raise ValueError(f"num_heads * head_dim is {self.width}; the time embedding needs an even number")
        if self.ofs_dim is not None and (self.ofs_dim != self.temb_dim or self.ofs_dim % 2):
            raise ValueError(
                f"ofs_dim is {self.ofs_dim}; it must be even and equal temb_dim, {self.temb_dim}"
            )
        if self.patch_t is not None and self.positions != "rotary":
            raise ValueError(
                f"positions is {self.positions!r}; with patch_t: {self.patch_t} only rotary is defined"
            )
        return self

    def plan(self) -> Plan:
        """Return the structure that strategies and adapters read."""
        block = "transformer_blocks.*"
        return Plan(
            blocks="transformer_blocks",
            num_heads=self.num_heads,
            attend=(f"{block}.attn1",),
            column=(*(f"{block}.attn1.to_{x}" for x in "qkv"), f"{block}.ff.net.0.proj"),
            row=(f"{block}.attn1.to_out.0", f"{block}.ff.net.2"),
            lora=("to_q", "to_k", "to_v", "to_out.0"),
            head=("norm_final", "norm_out", "proj_out"),
            row_widths=(self.width, 4 * self.width),
        )

    def rules(self) -> Card:
        """Return the card with every value that follows from the fields filled in."""
        derived: dict[str, Any] = {
            "size_step": VAE_STRIDE * self.patch,
            "text_length": self.text_length,
            "text_dim": self.text_dim,
            "latent_channels": self.latent_channels,
            "patch_t": self.patch_t or 1,
        }
        if self.image_condition:
            # In diffusers' sampling, 1.5 divides the image's latent by the scale factor, 1.0 multiplies.
            derived["image_latent"] = "scaled" if self.patch_t is None else "divided"
        if self.positions == "rotary+learned":
            derived["sizes"] = ((VAE_STRIDE * self.sample_height, VAE_STRIDE * self.sample_width),)
            derived["frames_max"] = self.sample_frames
        return Card(**{**derived, **self.card.model_dump(exclude_unset=True)})

    @classmethod
    def recognise(cls, foreign: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the recipe fields, with `use`, of diffusers' transformer/config.json; None if not ours.

        They make the model compute what diffusers does. A release is named by its preset. Raises FormatError
        where the file asks for something this model does not have.
        """
        if not diffusers_config.is_ours(foreign):
            return None
        found = cls(**diffusers_config.fields_of(foreign))
        for name, preset in PRESETS.items():
            if found.is_like(cls(**preset)):
                return {"use": name, "out_norm_eps": found.out_norm_eps}
        return {"use": "cogvideox", **found.model_dump(exclude_defaults=True)}

    @classmethod
    def infer(cls, tensors: Tensors) -> Inferred | None:
        """Return the fields, with `use`, of the model these are the weights of; None if they are not ours.

        A release is named by its preset, of which nothing is left open.
        """
        found = infer.predictor(tensors)
        if found is None:
            return None
        for name, preset in PRESETS.items():
            release = cls(**preset)
            if all(getattr(release, field) == value for field, value in found.fields.items()):
                return Inferred({"use": name})
        return found._replace(fields={"use": "cogvideox", **found.fields})

    def computed(self) -> Mapping[str, Callable[[], Tensor]]:
        """Return the tables that the model computes and some files hold, by canonical name; float32."""
        from cvx_plugins.cogvideox import positions

        return positions.stored_tables(self)

    def describe(self) -> Mapping[str, Any]:
        """Return diffusers' config.json of this model."""
        return diffusers_config.describe(self)

    def is_like(self, other: CogVideoXConfig) -> bool:
        """Tell whether both are the same model up to out_norm_eps, card and fields without effect."""
        ignored = {"card", "out_norm_eps", *self._unused()}
        return self.model_dump(exclude=ignored) == other.model_dump(exclude=ignored)

    def _unused(self) -> set[str]:
        """Return the fields about positions that do not enter the computation."""
        sample = {"sample_height", "sample_width", "sample_frames"}
        scales = {"spatial_interpolation_scale", "temporal_interpolation_scale"}
        if self.positions == "sincos":
            return sample | {"rope_grid"}
        if self.positions == "rotary+learned":
            return scales
        return scales | ({"sample_frames"} if self.rope_grid == "resize" else sample)


def predictor_components() -> Iterable[Component]:
    """Yield the bare transformer and one preset per release."""
    summary = "CogVideoX transformer; every hyper-parameter is a field"
    yield Component("predictor", "cogvideox", CogVideoXConfig, TARGET, summary=summary)
    for name, preset in PRESETS.items():
        yield Component("predictor", name, CogVideoXConfig, TARGET, preset, SUMMARIES[name])
