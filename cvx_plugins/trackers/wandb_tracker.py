"""The tracker `wandb`. The package is imported when it starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvx_core.interfaces import Deps
from cvx_io.atomic import write_text
from cvx_plugins.trackers import WandbConfig


class Wandb:
    """One run of Weights & Biases with the resolved recipe. A resumed run goes on in the same one.

    Steps that were shown before the run was resumed stay: the service takes no step twice.
    """

    def __init__(self, config: WandbConfig, deps: Deps):
        assert deps.spec is not None
        self._config, self._spec, self._folder = config, deps.spec, deps.spec.output
        self._wandb: Any = None
        self._run: Any = None

    def start(self, step: int) -> None:
        import wandb

        self._wandb = wandb
        known = self._folder / "wandb-run.txt"
        old = known.read_text(encoding="utf-8").strip() if step and known.exists() else None
        self._run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            name=self._config.name or self._spec.run.name,
            id=old,
            resume="allow" if old else None,
            mode=self._config.mode,
            dir=str(self._folder),
            config=self._spec.resolved,
        )
        write_text(known, f"{self._run.id}\n")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def video(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Video(str(path), format="mp4")}, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
