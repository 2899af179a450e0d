"""Trackers: where a run is shown besides its folder. What they need is imported when one starts."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import ClassVar, Literal

from cvx_core import Component, Config, Problem, Spec, hookimpl


class TensorboardConfig(Config):
    """Fields of `tensorboard`: event files in <output>/tensorboard."""

    videos: bool = True
    """Show validation videos too, as gifs among the images."""


class _PackageConfig(Config):
    """A tracker that a package of its own name provides."""

    package: ClassVar[str] = ""

    project: str = "cvx"
    """Project that the run is shown in."""
    name: str | None = None
    """Name of the run there; null: that of the recipe."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield that the package is not there: better now than when weights are loaded."""
        if find_spec(self.package) is None:
            yield Problem(
                "use", f"needs a package. Run `pip install {self.package}`, or leave this tracker out."
            )


class WandbConfig(_PackageConfig):
    """Fields of `wandb`: Weights & Biases."""

    package: ClassVar = "wandb"

    entity: str | None = None
    """User or team; null: the one that is logged in."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes to <output>/wandb alone; `wandb sync` sends it later."""


class TrackioConfig(_PackageConfig):
    """Fields of `trackio`: a database on this machine, which `trackio show` opens, or a Space."""

    package: ClassVar = "trackio"

    space: str | None = None
    """Space on the Hugging Face hub, such as user/name; null stays on this machine."""


@hookimpl
def cvx_components() -> Iterable[Component]:
    target = "cvx_plugins.trackers."
    yield Component(
        "tracker",
        "tensorboard",
        TensorboardConfig,
        f"{target}tensorboard:Tensorboard",
        summary="event files in the output folder",
    )
    yield Component(
        "tracker", "wandb", WandbConfig, f"{target}wandb_tracker:Wandb", summary="Weights & Biases"
    )
    yield Component(
        "tracker",
        "trackio",
        TrackioConfig,
        f"{target}trackio_tracker:Trackio",
        summary="trackio, local-first",
    )
