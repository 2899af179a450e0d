"""What files a checkpoint has, and whether they still are what was written."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cvx_core.errors import FormatError

_PIECE = 1 << 24
"""Bytes read at a time."""


class DamagedError(FormatError):
    """A checkpoint whose files are not those that were written."""


def listing(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return {name: size in bytes and CRC-32} of files."""
    return {file.name: {"bytes": file.stat().st_size, "crc32": _crc32(file)} for file in files}


def check_sizes(folder: Path, listed: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise DamagedError where a listed file is missing or of another size."""
    for name, said in listed.items():
        file = folder / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != said["bytes"]:
            state = "is missing" if actual is None else f"has {actual} bytes instead of {said['bytes']}"
            raise DamagedError(f"{file}: {state}, so the checkpoint is damaged. Resume from an earlier one.")


def check_content(folder: Path, listed: Mapping[str, Mapping[str, Any]]) -> None:
    """Read listed files; raises DamagedError where one does not hold what was written."""
    for name, said in listed.items():
        try:
            found = _crc32(folder / name)
        except OSError as error:
            raise DamagedError(f"{folder / name}: cannot be read: {error.strerror}.") from error
        if found != said["crc32"]:
            raise DamagedError(
                f"{folder / name}: holds other bytes than were written (CRC-32 {found} instead of "
                f"{said['crc32']}), so the checkpoint is damaged. Resume from an earlier one."
            )


def _crc32(file: Path) -> str:
    value = 0
    with file.open("rb") as opened:
        while piece := opened.read(_PIECE):
            value = zlib.crc32(piece, value)
    return f"{value:08x}"
