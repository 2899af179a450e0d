"""Which files decord reads exactly, found by comparing its frames with undisturbed decoding.

It takes packets for frames in decoding order, so that it miscounts after a seek where the two differ; it
converts deep colour by other rules; and it takes a padded row for more colour channels where that divides.
"""

from __future__ import annotations

from cvx_io.members import locate
from cvx_plugins.readers.index import Index

SEEKABLE_CONTAINERS = ("mov", "matroska")


def obstacles(index: Index) -> tuple[str, ...]:
    """Return what keeps decord from reading a file exactly; empty where it does."""
    found = []
    if locate(index.path) is not None:
        found.append("a place inside a tar shard")
    if index.container not in SEEKABLE_CONTAINERS:
        found.append(f"a container of type {index.container}")
    elif not index.is_plain:
        found.append(
            "frames that are shown before the key frame they follow (open groups of pictures), or never"
        )
    if index.bits > 8:
        found.append(f"{index.bits}-bit pixels")
    if any(_padding_looks_like_channels(index.width, alignment) for alignment in (32, 64)):
        found.append(f"a width of {index.width} pixels")
    return tuple(found)


def _padding_looks_like_channels(width: int, alignment: int) -> bool:
    """Whether an RGB row, padded by FFmpeg to a multiple of `alignment` bytes, is n > 3 times the width."""
    step = 1
    while -(-width // step) * step * 3 % alignment:
        step *= 2
    padded = -(-width // step) * step * 3
    return padded % width == 0 and padded != 3 * width
