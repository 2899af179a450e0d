"""Errors of the file system in words: what could not be written, why, and what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cvx_core.errors import CvxError

_ROOM = "Make room there, or give another output; what was complete before is kept"
_RIGHT = "Allow writing there, or give another output"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EACCES: _RIGHT,
    errno.EPERM: _RIGHT,
    errno.EROFS: _RIGHT,
    errno.ENOTDIR: "A file is where a folder has to be: move it away, or give another output",
    errno.EEXIST: "A file is where a folder has to be: move it away, or give another output",
    errno.EISDIR: "A folder is where a file has to be: move it away, or give another output",
    errno.ENAMETOOLONG: "Give a shorter name or output",
    errno.EIO: "The disk or the network behind it fails; what was complete before is kept",
}


@contextmanager
def in_words(output: Path) -> Iterator[None]:
    """Raise CvxError in place of a known error of the file system, that of another library included.

    output: the folder it is about where the error names no file.
    """
    try:
        yield
    except CvxError:
        raise
    except BaseException as error:  # that of torch's checkpoints is no Exception
        number, file = _source(error)
        if number not in _REMEDIES:
            raise
        again = "" if not (output / "checkpoints").is_dir() else ", and task.resume=auto goes on from there"
        raise CvxError(f"{file or output}: {os.strerror(number)}. {_REMEDIES[number]}{again}.") from error


def _source(error: BaseException) -> tuple[int, str | None]:
    """Return the system's number for an error and the file it names; 0 where it is none of the system."""
    if isinstance(error, OSError):
        return error.errno or 0, str(error.filename) if error.filename is not None else None
    for failure in getattr(error, "failures", {}).values():  # of torch's checkpoints, by rank
        if (found := _source(failure[0]))[0]:
            return found
    if (match := re.search(r"\(os error (\d+)\)", str(error))) is not None:
        return int(match[1]), None
    return _source(error.__cause__) if error.__cause__ is not None else (0, None)
