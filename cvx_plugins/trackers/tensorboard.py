"""The tracker `tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvx_core.interfaces import Deps
from cvx_plugins.trackers import TensorboardConfig

WIDEST = 640
"""Pixels of the longer side of a gif; one of full size would be many times the mp4."""


class Tensorboard:
    """Writes event files; those past the step that a run is resumed at are marked as out of date."""

    def __init__(self, config: TensorboardConfig, deps: Deps):
        assert deps.spec is not None
        self._config, self._folder = config, deps.spec.output / "tensorboard"
        self._writer: Any = None

    def start(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1 if step else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers of a step, all in one event."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        shown = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.file_writer.add_summary(Summary(value=shown), step)

    def video(self, step: int, name: str, path: Path) -> None:
        """Show a video as a gif, which is what event files hold of moving pictures."""
        if not self._config.videos:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        from cvx_io.video_grid import read_mp4, smaller
        from cvx_io.video_write import gif_bytes

        frames, fps = read_mp4(path)
        frames = smaller(frames, WIDEST)
        _, height, width, _ = frames.shape
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=gif_bytes(frames, fps)
        )
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
