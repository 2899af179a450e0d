"""What each kind of component must offer, and the values of `cvx_core.values` that travel between them.
Structural: nothing to inherit.

Shape letters: B batch; C latent channels; F H W pixel frames, height, width; T h w latent frames, height,
width; S video tokens; L text tokens; D width; E time-embedding width; N heads; K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from cvx_core.values import (  # noqa: F401  all of them can be imported from here
    Batch,
    Condition,
    Features,
    Inferred,
    Noised,
    ParamGroup,
    Piece,
    Plan,
    Row,
    TensorInfo,
    Tensors,
    Tokens,
    Work,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cvx_core.random import Draws
    from cvx_core.spec import Spec


class Predictor(Protocol):
    """An nn.Module that predicts the target from a noisy latent. Slots: split, join; on each block: run."""

    blocks: Any  # the ModuleDict named by Plan.blocks is also reachable here

    def embed(self, latent: Tensor, timestep: Tensor, cond: Condition) -> Tokens: ...
    def outline(self, latent: Tensor, cond: Condition) -> Tokens:
        """Return tokens as `embed` would, tables included, but without values: it uses no parameter."""
        ...

    def head(self, tokens: Tokens) -> Tensor: ...
    def forward(self, latent: Tensor, timestep: Tensor, cond: Condition) -> Tensor: ...


class TextEncoder(Protocol):
    """An nn.Module that embeds prompts."""

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return embeddings (B,L,D) and mask (B,L) bool, True where a token is real; L is always the same."""
        ...

    def unconditional(self, count: int) -> tuple[Tensor, Tensor]:
        """Return what stands for "no prompt", as encode does."""
        ...


class Autoencoder(Protocol):
    """An nn.Module that maps video to latent and back. Tiling and slicing are config, not arguments."""

    compression: tuple[int, int, int]  # frames, height, width
    latent_channels: int
    scale_factor: float

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior's mean and standard deviation, unscaled, each (B,C,T,h,w)."""
        ...

    def encode(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a scaled latent: drawn from the posterior with `generator`, its mean without."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Return the video (B,3,F,H,W) of a scaled latent."""
        ...


class NoiseSchedule(Protocol):
    """Pure functions of the noise level. alpha_bar (1000,) float64."""

    alpha_bar: Tensor

    def add_noise(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor: ...
    def target(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor: ...
    def to_x0(self, prediction: Tensor, noisy: Tensor, timestep: Tensor) -> Tensor: ...


class Scheduler(Protocol):
    """An immutable noise schedule with a sampler; there is no set_timesteps()."""

    noise: NoiseSchedule

    def draw(self, count: int, generator: torch.Generator, rank: int = 0, world: int = 1) -> Tensor:
        """Return training timesteps (count,) int64 on the CPU."""
        ...

    def timesteps(self, steps: int) -> list[int]:
        """Return the sampling timesteps, descending."""
        ...

    def step(
        self,
        prediction: Tensor,
        index: int,
        timesteps: Sequence[int],
        latent: Tensor,
        memory: Any,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Any]:
        """Go from timesteps[index] to the next noise level; memory is None at first, then what the last step
        gave.
        """
        ...

    def guidance(self, scale: float, index: int, timesteps: Sequence[int]) -> float:
        """Return the dynamic guidance weight at timesteps[index]."""
        ...


class Dataset(Protocol):
    """Lists what exists; opens no media and imports no torch."""

    def rows(self) -> Sequence[Row]: ...


class Clip(Protocol):
    """An open video file.

    Where frames are not shown at a steady rate, it has `times` too: seconds after the first, one per frame.
    Without them, frames are picked as if each were shown 1 / fps seconds.
    """

    num_frames: int
    fps: float
    height: int
    width: int

    def frames(self, indices: Sequence[int]) -> Any:
        """Return the frames (len(indices),height,width,3) as a uint8 array; indices ascend and may repeat."""
        ...

    def close(self) -> None: ...


class Reader(Protocol):
    """Opens video files.

    One that shows damaged frames as its library makes them up has `check(path)`, which raises FormatError
    where there are any; it decodes the whole file.
    """

    def open(self, path: Path) -> Clip: ...


class Optimizer(Protocol):
    """Makes torch optimizers.

    One whose state holds `master` for a parameter keeps the weights there, which the parameter has rounded:
    what changes there counts as a change. One with `with_gradient(param)` keeps gradients in what it
    returns.
    """

    def build(self, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer: ...


class Adapter(Protocol):
    """Adds trainable parameters to a predictor; files of the model do not hold them.

    One that also has `off(predictor)`, a context in which the predictor computes as it would without, lets
    the base be sampled at any time.

    Names and tensors that methods take and return are canonical; what goes into files is what `held` returns.
    """

    def apply(self, predictor: Any) -> list[str]:
        """Change the predictor in place; return the FQNs left trainable."""
        ...

    def initial(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return what a parameter that it added starts as."""
        ...

    def adopt(self, tensors: Tensors, where: str) -> Tensors:
        """Return values of all added parameters out of a file's tensors. Raises FormatError where they do not
        fit.
        """
        ...

    def held(self, tensors: Tensors) -> Tensors:
        """Return what a file of it holds, out of the predictor's parameters."""
        ...

    def effect(self, tensors: Tensors) -> list[str]:
        """Return the modules of a predictor with these parameters that it does not change.

        Raises CvxError where these are all of its modules.
        """
        ...

    def compare(self, ours: Tensors, source: Tensors, where: str) -> None:
        """Raise FormatError where two files of it would not change a predictor alike."""
        ...

    def merged(self, tensors: Tensors) -> Tensors:
        """Return a predictor's parameters without those added, their change worked into the others."""
        ...


class LoadedAdapter(Protocol):
    """A change to a predictor's weights that is read from a file and worked in while they are loaded."""

    def changed(self, base: Tensors, tensors: Tensors, where: str) -> tuple[Tensors, Mapping[str, Any]]:
        """Return the predictor's tensors as the file's change them, and an account in plain values.

        Raises FormatError where the two do not fit.
        """
        ...


class Strategy(Protocol):
    """Places parts on many devices through slots, DTensors and the callables of Parts; never renames a
    parameter.

    A strategy that has to know what others put into the callables of Parts also has `finish(parts)`, which is
    called after all have been applied.
    """

    def apply(self, parts: Parts) -> Parts: ...


@runtime_checkable
class Format(Protocol):
    """A container and layout on disk; knows no model. `names` is the rule table of (family, format).

    A format that cannot write everything also has `check(path, tensors, names)`, which raises what `write`
    would, from shapes alone.
    """

    def accepts(self, path: Path) -> bool:
        """Tell from file names and headers whether `path` is of this format; no two formats agree."""
        ...

    def open(self, path: Path, names: Any = None) -> Tensors:
        """Return what is at `path` under canonical names. Raises FormatError before any tensor is read."""
        ...

    def write(
        self, path: Path, tensors: Tensors, names: Any = None, config: Mapping[str, Any] | None = None
    ) -> None:
        """Write tensors that have canonical names, whole or not at all, one at a time.

        config: the model's config.json, for formats that keep it.
        """
        ...


@runtime_checkable
class ModelFormat(Format, Protocol):
    """A format that can hold all parts of a model."""

    def write_model(self, path: Path, pieces: Mapping[str, Piece]) -> None:
        """Write parts, by recipe section, as one folder that `model: PATH` reads."""
        ...


class Objective(Protocol):
    """What a task minimises: the mean of `error` over the rows, divided by `accumulate`."""

    accumulate: int

    def noised(
        self, features: Features, draws: Draws, dtype: Any, timestep: Tensor | None = None
    ) -> Noised: ...
    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the error of each row (B,)."""
        ...


class Task(Protocol):
    """The job of a recipe."""

    def prepare(self, parts: Parts, spec: Spec) -> Parts:
        """Fill the callables of Parts with their one-device defaults, before strategies replace them."""
        ...

    def run(self, parts: Parts, spec: Spec) -> None: ...


class Tracker(Protocol):
    """Shows a run elsewhere than in its folder. The first rank alone has trackers; any of these may raise."""

    def start(self, step: int) -> None:
        """Begin, or go on from a step that a run is resumed at: what was shown past it is out of date."""
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers by name; for one step there may be several calls."""
        ...

    def video(self, step: int, name: str, path: Path) -> None:
        """Show an mp4 file."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class Guided(Protocol):
    """Predicts with and without what a prediction is conditioned on."""

    def __call__(
        self, latent: Tensor, timestep: Tensor, uncond: Condition, cond: Condition
    ) -> tuple[Tensor, Tensor]:
        """Return two predictions (B,C,T,h,w), the unconditional one first. timestep: (B,)."""
        ...


@dataclass(frozen=True)
class Deps:
    """What a factory may read besides its own config: the recipe it is part of."""

    spec: Spec | None = None


@dataclass(frozen=True)
class Parts:
    """Everything a task works with. A strategy returns a changed copy (dataclasses.replace)."""

    device: Any = None
    predictor: Any = None
    text_encoder: Any = None
    autoencoder: Any = None
    scheduler: Any = None
    dataset: Any = None
    adapter: Any = None
    task: Any = None
    mesh: Any = None
    trains: str | None = None  # the section that the task trains
    trainable: frozenset[str] = frozenset()
    added: frozenset[str] = frozenset()  # the predictor's parameters that the adapter added
    elsewhere: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # the predictor's, on other ranks
    loaded: Mapping[str, Any] = field(default_factory=dict)  # by section: where its weights came from
    data_axes: tuple[str, ...] = ("dp_replicate", "dp_shard")
    encoder: Any = None  # batches to features, one at a time; slots: moments_of, embeds_of
    encode: Callable[[Iterator[Work]], Iterator[Work]] | None = None
    objective: Objective | None = None  # what forward_backward minimises, for those who compute it in pieces
    forward_backward: Callable[..., Tensor] | None = None
    guided: Guided | None = None  # what sampling asks for at each step
    make_optimizer: Callable[[Sequence[ParamGroup]], torch.optim.Optimizer] | None = None
    before_update: Callable[[bool], None] = lambda _is_last: (
        None
    )  # before each batch of a step: is it the last?
    after_backward: Callable[[], None] = lambda: None  # once per step, before its gradients are used

    mark: Callable[[str], None] = lambda _what: None  # states progress: a rank that states none is named

    @property
    def trained(self) -> Any:
        """The module that the task trains, or None."""
        return getattr(self, self.trains) if self.trains is not None else None

    @property
    def methods(self) -> list[str]:
        """The methods of the trained module, besides forward, that tasks call and that use its parameters."""
        return [name for name in ("reconstruct", "moments") if hasattr(self.trained, name)]

    @property
    def blocks(self) -> list[Any]:
        """The blocks of the trained module on this rank, in order; none where it has no such list."""
        return list(getattr(self.trained, "blocks", {}).values())
