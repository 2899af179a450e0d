"""The reader that chooses a library for every file, and says which."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from cvx_core.interfaces import Clip
from cvx_plugins.readers.decord_limits import obstacles
from cvx_plugins.readers.index import scan, scan_open
from cvx_plugins.readers.pyav_reader import PyavReader

logger = logging.getLogger("cvx.readers")


class AutoReader:
    """Reads a file with the preferred library where that is exact, with PyAV elsewhere; frames are the same.

    `chosen` is the preferred reader that was found; `choice(path)` tells a file's.
    """

    name = "auto"

    def __init__(self, prefer: str = "pyav", threads: int = 1):
        self.pyav = PyavReader(threads)
        self.chosen: Any = self.pyav
        if prefer == "decord" and importlib.util.find_spec("decord") is not None:
            from cvx_plugins.readers.decord_reader import DecordReader

            self.chosen = DecordReader(threads)
        logger.info("reader auto: %s%s", self.chosen.name, self._why(prefer))

    def open(self, path: Path) -> Clip:
        """Return an open clip. Raises FormatError where the file is no readable video."""
        if self.chosen is self.pyav:
            return self.pyav.open(path)
        index, container = scan_open(Path(path))
        if found := obstacles(index):
            logger.debug("%s: read by pyav, for it has %s", path, " and ".join(found))
            return self.pyav.open_index(index, container)
        container.close()
        return self.chosen.open_index(index)

    def check(self, path: Path) -> None:
        """Raise FormatError where a frame is damaged and the preferred reader does not tell."""
        if self.chosen is not self.pyav:
            self.chosen.check(path)

    def choice(self, path: Path) -> str:
        """Return the name of the library that reads a file."""
        return self.pyav.name if obstacles(scan(Path(path))) else str(self.chosen.name)

    def _why(self, prefer: str) -> str:
        if prefer == self.chosen.name:
            return ", as preferred; pyav for files in which decord is not exact" if prefer == "decord" else ""
        return ", for decord is not installed"


def build(cfg: Any, _deps: Any = None) -> AutoReader:
    """Return the reader of an AutoConfig."""
    return AutoReader(cfg.prefer, cfg.threads)
