"""The variant card: the rules of a released model as data, and the checks that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from cvx_core.config import Config, Positive
from cvx_core.errors import Problem

if TYPE_CHECKING:
    from cvx_core.spec import Spec


AUTOENCODER_FRAMES = 4
"""Pixel frames of a latent frame: clips of 4*N+1 frames can be encoded, whatever a release was trained on."""


class Card(Config):
    """What a predictor demands of the recipe around it. None: no rule.

    Every value may be overridden in a recipe (`predictor: {card: {frames_step: 4}}`) by somebody who knows
    better.
    """

    frames_step: Positive = 4
    """Legal frame counts are frames_step * N + 1."""
    frames_max: int | None = None
    """Largest legal frame count."""
    size_step: Positive = 8
    """Height and width must be multiples of this: the autoencoder's compression times the spatial patch."""
    sizes: tuple[tuple[int, int], ...] | None = None
    """The only legal (height, width) pairs; None allows any multiple of size_step."""
    video: tuple[int, int, int] | None = None
    """Frames, height and width of the release; the default of the recipe's video."""
    fps: int | None = None
    """Frames per second the model was trained at; the default of video.fps."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the release; the default of dtype on accelerators."""
    latent_scale: float | None = None
    """The autoencoder's scale factor."""
    image_latent: Literal["none", "scaled", "unscaled", "divided"] = "none"
    """First-frame condition: none (text only); latent times latent_scale, as it is, or divided by
    latent_scale.
    """
    snr_shift: float | None = None
    """The scheduler's SNR shift."""
    text_length: int | None = None
    """Number of text tokens."""
    text_dim: int | None = None
    """Width of a text token's embedding."""
    latent_channels: int | None = None
    """Channels of a latent."""
    patch_t: Positive = 1
    """Latent frames per patch; a clip's latent is padded in front up to a multiple of it."""

    def defaults(self) -> Mapping[tuple[str, str], Any]:
        """Return {(section, field): value}: what a recipe gets where it says nothing."""
        frames, height, width = self.video or (None, None, None)
        values = {
            ("video", "frames"): frames,
            ("video", "height"): height,
            ("video", "width"): width,
            ("video", "fps"): self.fps,
            ("autoencoder", "scale_factor"): self.latent_scale,
            ("scheduler", "snr_shift"): self.snr_shift,
            ("text_encoder", "max_length"): self.text_length,
        }
        return {key: value for key, value in values.items() if value is not None}

    def demands(self) -> Mapping[tuple[str, str], Any]:
        """Return {(section, field): value} that the recipe's other components must agree with."""
        values = {
            **{key: value for key, value in self.defaults().items() if key[0] != "video"},
            ("autoencoder", "latent_channels"): self.latent_channels,
            ("text_encoder", "dim"): self.text_dim,
        }
        return {key: value for key, value in values.items() if value is not None}

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield what the recipe's geometry and other components disagree about with this card."""
        video = spec.video
        yield from self.geometry(spec.name_of("predictor"), video.frames, video.height, video.width)
        for (section, name), legal in self.demands().items():
            value = getattr(spec.config(section), name, None)
            if value is not None and value != legal:
                yield Problem(
                    f"{section}.{name}",
                    f"is {value}, but predictor {spec.name_of('predictor')!r} needs {legal}. "
                    "Leave the field out to follow the predictor.",
                )

    def padding(self, latent_frames: int) -> int:
        """Return how many latent frames go in front so that patches of patch_t frames fit."""
        return -latent_frames % self.patch_t

    def geometry(self, predictor: str, frames: int, height: int, width: int) -> Iterable[Problem]:
        """Yield why clips of a geometry are not for this card; paths are as if `video` stated it."""
        who = f"predictor {predictor!r}"
        if (frames - 1) % self.frames_step or (self.frames_max and frames > self.frames_max):
            limit = f" up to {self.frames_max}" if self.frames_max else ""
            near = self._nearest_frames(frames)
            yield Problem(
                "video.frames",
                f"got {frames}; {who} takes {self.frames_step}*N+1 frames{limit}. Nearest: {near}."
                f"{self._override(frames)}",
            )
        if self.sizes is not None and (height, width) not in self.sizes:
            legal = " or ".join(f"{h}x{w}" for h, w in self.sizes)
            yield Problem("video", f"got {height}x{width} (height x width); {who} takes {legal} only.")
            return
        for name, value in (("height", height), ("width", width)):
            if value % self.size_step:
                low = value // self.size_step * self.size_step
                legal = " or ".join(str(n) for n in (low, low + self.size_step) if n)
                yield Problem(
                    f"video.{name}",
                    f"got {value}; {who} takes multiples of {self.size_step}. Nearest: {legal}.",
                )

    def _override(self, frames: int) -> str:
        """Return what to state for a number of frames that the autoencoder takes and the release does not."""
        fields = []
        if (frames - 1) % AUTOENCODER_FRAMES:
            return ""
        if (frames - 1) % self.frames_step:
            fields.append(f"predictor.card.frames_step: {AUTOENCODER_FRAMES}")
        if self.frames_max and frames > self.frames_max:
            fields.append(f"predictor.card.frames_max: {frames}")
        return f" To train on it nevertheless, state {' and '.join(fields)}."

    def _nearest_frames(self, frames: int) -> str:
        low = (frames - 1) // self.frames_step * self.frames_step + 1
        if self.frames_max:
            low = min(low, (self.frames_max - 1) // self.frames_step * self.frames_step + 1)
        high = low + self.frames_step
        near = [n for n in (low, high) if n > 0 and (not self.frames_max or n <= self.frames_max)]
        return " or ".join(map(str, near))
