"""Built-in video readers. Their libraries are imported when a recipe's reader is built."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from cvx_core import Component, Config, hookimpl
from cvx_core.config import NonNegative


class ReaderConfig(Config):
    """Fields of every reader."""

    threads: NonNegative = 1
    """Decoder threads of one clip; 0 lets the library choose. With more than one, FFmpeg does not always say
    which frames it made up for damaged ones; several workers read as fast.
    """


class AutoConfig(ReaderConfig):
    """Fields of the reader that chooses per file."""

    prefer: Literal["decord", "pyav"] = "pyav"
    """What reads a file that both libraries read exactly; the frames are the same, PyAV takes less CPU time.
    pyav reads the rest."""


@hookimpl
def cvx_components() -> Iterable[Component]:
    yield Component(
        "reader",
        "pyav",
        ReaderConfig,
        "cvx_plugins.readers.pyav_reader:build",
        summary="PyAV; any file, frame-exact",
    )
    yield Component(
        "reader",
        "decord",
        ReaderConfig,
        "cvx_plugins.readers.decord_reader:build",
        summary="decord; refuses the files in which it cannot seek exactly",
    )
    yield Component(
        "reader",
        "torchcodec",
        ReaderConfig,
        "cvx_plugins.readers.torchcodec_reader:build",
        summary="torchcodec, installed apart; refuses rotated files and those that decord refuses",
    )
    yield Component(
        "reader",
        "auto",
        AutoConfig,
        "cvx_plugins.readers.auto_reader:build",
        summary="the preferred library where it is installed and exact, PyAV elsewhere",
    )
