"""Files inside tar shards, read where they lie: `shard.tar/name.mp4` stands for a member. No torch.

Whoever opens media takes paths of both kinds; a plain file comes back as it is.
"""

from __future__ import annotations

import io
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cvx_core.errors import FormatError


class Member(NamedTuple):
    """A file within a shard: bytes start .. start + size of it."""

    shard: Path
    start: int
    size: int


def members(shard: Path) -> dict[str, Member]:
    """Return the files of a shard by name, in its order. Raises FormatError where it is no plain tar file."""
    status = shard.stat()
    return _index(shard, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=256)
def _index(shard: Path, _time: int, size: int) -> dict[str, Member]:
    found: dict[str, Member] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                if info.isfile():
                    found[info.name.removeprefix("./")] = Member(shard, info.offset_data, info.size)
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise FormatError(
            f"{shard}: not a plain tar file: {error}. Unpack a compressed one first, or fetch it again."
        ) from error
    if late := [name for name, member in found.items() if member.start + member.size > size]:
        raise FormatError(f"{shard}: truncated within {late[0]!r}. Copy or download it again.")
    with shard.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            last = f"after {next(reversed(found))!r}" if found else "at its start"
            raise FormatError(f"{shard}: truncated: no end is marked {last}. Copy or download it again.")
    return found


def locate(path: Path) -> Member | None:
    """Return the member a path stands for; None for a plain file, and for what does not exist."""
    if path.exists():
        return None
    for parent in path.parents:
        if parent.is_file():
            name = path.relative_to(parent).as_posix()
            return members(parent).get(name) if tarfile.is_tarfile(parent) else None
        if parent.exists():
            return None
    return None


def is_there(path: Path) -> bool:
    """Tell whether a path is a file, plain or within a shard."""
    return path.is_file() or locate(path) is not None


def num_bytes(path: Path) -> int:
    """Return the size of a file of either kind."""
    member = locate(path)
    return member.size if member is not None else path.stat().st_size


def address(path: Path) -> str:
    """Return what FFmpeg opens for a file of either kind; a member by its own protocol for parts of files."""
    member = locate(path)
    if member is None:
        return str(path)
    return f"subfile,,start,{member.start},end,{member.start + member.size},,:{member.shard}"


def open_binary(path: Path) -> BinaryIO:
    """Open a file of either kind for reading; a member is read whole."""
    member = locate(path)
    if member is None:
        return path.open("rb")
    with member.shard.open("rb") as file:
        file.seek(member.start)
        return io.BytesIO(file.read(member.size))
