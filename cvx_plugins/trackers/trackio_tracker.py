"""The tracker `trackio`. The package is imported when it starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvx_core.interfaces import Deps
from cvx_plugins.trackers import TrackioConfig


class Trackio:
    """One run of trackio with the resolved recipe; a resumed run goes on in the one of its name."""

    def __init__(self, config: TrackioConfig, deps: Deps):
        assert deps.spec is not None
        self._config, self._spec = config, deps.spec
        self._trackio: Any = None
        self._run: Any = None

    def start(self, step: int) -> None:
        import trackio

        self._trackio = trackio
        self._run = trackio.init(
            project=self._config.project,
            name=self._config.name or self._spec.run.name,
            space_id=self._config.space,
            config=self._spec.resolved,
            resume="allow" if step else "never",
            embed=False,
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def video(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._trackio.Video(str(path), format="mp4")}, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
