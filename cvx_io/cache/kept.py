"""Small items of a feature cache, kept in memory once they are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cvx_io.cache.items import read_item

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 1 << 16
"""Bytes of an item up to which opening its file costs more than the bytes do."""
ROOM = 1 << 26
"""Bytes that are kept."""


class Kept:
    """Reads items, each of the small ones once while there is room. Sent to another process it comes empty.

    Nothing makes way: every row is read once an epoch, so no item is of more use than another.
    """

    def __init__(self, room: int = ROOM):
        self._room, self._left = room, room
        self._items: dict[Path, tuple[Tensor, Tensor]] = {}

    def read(self, path: Path, kind: str) -> tuple[Tensor, Tensor]:
        """Return the two tensors of an item, not to be changed. Raises FormatError like `read_item`."""
        if (kept := self._items.get(path)) is not None:
            return kept
        item = read_item(path, kind)
        size = item[0].nbytes + item[1].nbytes
        if size <= min(SMALL, self._left):
            self._left -= size
            self._items[path] = item
        return item

    def __reduce__(self) -> tuple[type[Kept], tuple[int]]:
        return Kept, (self._room,)
