"""The `inspect` task: what training would make of every clip of a recipe. Reads clips, builds no model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar

from pydantic import Field

from cvx_core import Component
from cvx_core.config import Positive
from cvx_core.errors import CvxError
from cvx_core.interfaces import Deps, Parts
from cvx_core.run_config import TaskConfig
from cvx_core.spec import Spec


class InspectConfig(TaskConfig):
    """Decode every clip and write inspection.csv and inspection.html."""

    needs: ClassVar = ("dataset", "reader", "loader")
    optional: ClassVar = ("predictor", "text_encoder")
    buckets: ClassVar = True

    jobs: Positive = 2
    """Processes that decode; a file that crashes one costs only itself."""
    timeout_s: Annotated[float, Field(gt=0)] = 300
    """Seconds that one file may take."""

    @property
    def ranks(self) -> int | None:
        """One process, and nothing to build."""
        return 1


class Inspect:
    """The task."""

    def __init__(self, config: InspectConfig, deps: Deps):
        self._config = config

    def run(self, parts: Parts, spec: Spec) -> None:
        """Write the report. Raises CvxError, after it is written, where too many clips are dropped."""
        from cvx_io.data import report

        if report(spec, spec.output, self._config.jobs, self._config.timeout_s):
            raise CvxError(
                f"more clips are dropped than loader.max_drop allows: see {spec.output / 'inspection.html'}."
            )


def components() -> Iterable[Component]:
    """Yield the task."""
    yield Component(
        "task",
        "inspect",
        InspectConfig,
        "cvx_plugins.tasks.inspect_data:Inspect",
        summary="decode every clip, say which bucket it goes to, or why it is dropped",
    )
