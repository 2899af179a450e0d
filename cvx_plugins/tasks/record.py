"""The record of a run: what it is, where it takes place, its log, clips as they were given, and the report.

Written on the first rank only. Nothing here may end a run: what cannot be written costs itself and is said.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F

from cvx_core import device as devices
from cvx_core.errors import CvxError
from cvx_core.interfaces import Batch, Parts
from cvx_core.registry import Choice
from cvx_core.spec import Spec
from cvx_io.atomic import write_json, write_text
from cvx_io.log import RunLog
from cvx_io.record import files
from cvx_io.record.environment import environment, now
from cvx_io.record.lock import components_of, plugin_lock
from cvx_io.report import write_report
from cvx_io.video_write import to_uint8, write_mp4
from cvx_plugins.tasks.tracking import Tracking

log = logging.getLogger("cvx")
CLIPS = 4
"""Clips of the first batch that are kept as they were given."""
LONGEST = 480
"""Pixels of the longer side of a kept clip; larger ones are made smaller."""


def write_facts(
    spec: Spec, loaded: Mapping[str, Any], device: torch.device, world: int, step: int = 0
) -> None:
    """Write the resolved recipe, the account of the weights, the plugin lock and the environment.

    step: the one the run goes on from. Earlier starts stay in the environment's file.
    """
    folder = spec.output
    write_text(folder / files.RECIPE, spec.to_yaml())
    write_json(folder / "weights.json", dict(loaded))
    used = components_of([*spec.choices.values(), *spec.parallel])
    write_json(folder / files.PLUGINS, {"plugins": plugin_lock(used)})
    start = {"time": now(), "step": step, **environment(str(device), devices.name(device), world)}
    write_json(folder / files.ENVIRONMENT, {"starts": [*_starts(folder), start]})


def end(folder: Path, how: str) -> None:
    """Note how a run has ended, and write its report."""
    with _beside("the report"):
        *earlier, last = _starts(folder)
        last = {**last, "ended": {"time": now(), "how": how}}
        write_json(folder / files.ENVIRONMENT, {"starts": [*earlier, last]})
        log.info("report in %s", write_report(folder))


@contextmanager
def recorded(parts: Parts, spec: Spec, how: str) -> Iterator[None]:
    """Write what a run without checkpoints is, on the first rank; on leaving, note how it has ended.

    how: what a good end is. Raises CvxError where the folder is that of a training run.
    """
    if (spec.output / "checkpoints").is_dir():
        raise CvxError(
            f"{spec.output} is the folder of a training run, and this would replace its record. Give another "
            "output."
        )
    if not parts.mesh.is_first:
        yield
        return
    write_facts(spec, parts.loaded, parts.device, parts.mesh.degrees.world)
    try:
        yield
    except BaseException as error:
        end(spec.output, _how(error))
        raise
    end(spec.output, how)


class Record:
    """The record of a training run. A context: leaving it notes how the run ended, and writes the report."""

    def __init__(self, spec: Spec, step: int, trackers: Sequence[Choice]):
        """Open it at a step. Raises CvxError where a tracker cannot start."""
        self._spec, self._folder = spec, spec.output
        self._log = RunLog(self._folder, step)
        self._tracking = Tracking(trackers, spec, step)
        self._wants_clips = not (self._folder / files.GIVEN).exists()

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._tracking.close()
        end(self._folder, _how(error))

    def write(self, step: int, exact: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        """Log one step, as RunLog does, and show it."""
        self._log.write(step, exact, speed)
        self._tracking.scalars(step, {**exact, **speed})

    def validated(self, step: int, exact: Mapping[str, Any], grid: Path | None) -> None:
        """Log a validation, in a line of its own, and show it. grid: its videos side by side."""
        self._tracking.scalars(step, exact)
        if grid is not None:
            self._tracking.video(step, "validation/videos", grid)
        self._log.write(step, exact)

    def look(self, batch: Batch) -> None:
        """Keep some clips of the first batch of a run that has pixels, with their prompts."""
        if not self._wants_clips or batch.video is None:
            return
        self._wants_clips = False
        with _beside("clips as they are given to the model"):
            for index, video in enumerate(batch.video[:CLIPS]):
                path = self._folder / files.GIVEN / f"{index:02d}.mp4"
                record = {"prompt": batch.prompts[index], "row": batch.rows[index].id}
                write_mp4(path, to_uint8(_small(video)), self._spec.video.fps, record, crf=23)
                write_json(path.with_suffix(".json"), record)


def _how(error: BaseException | None) -> str:
    if error is None:
        return "Ended and saved"
    words = str(error) if isinstance(error, CvxError) else f"{type(error).__name__}: {error}".rstrip(": ")
    return f"Ended by an error: {words.rstrip('.')}"


def _small(video: torch.Tensor) -> torch.Tensor:
    """Return a clip (3,F,H,W) within the longest side, of even height and width."""
    height, width = video.shape[-2:]
    share = min(1.0, LONGEST / max(height, width))
    size = [max(2, int(length * share) // 2 * 2) for length in (height, width)]
    if size == [height, width]:
        return video
    return F.interpolate(video.transpose(0, 1), size=size, mode="area").transpose(0, 1)


def _starts(folder: Path) -> list[dict[str, Any]]:
    """Return the starts of a run so far, none where they cannot be read."""
    return [dict(start) for start in files.read_object(folder / files.ENVIRONMENT, []).get("starts", ())]


@contextmanager
def _beside(what: str) -> Iterator[None]:
    """Turn a failure of something that a run does not need into a warning."""
    try:
        yield
    except Exception as error:  # whatever it is, hours of training must not end by it
        log.warning("%s could not be written: %s: %s", what, type(error).__name__, error)
