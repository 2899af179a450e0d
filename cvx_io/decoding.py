"""Files decoded in processes of their own: one that crashes or hangs the decoder costs only itself."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cvx_core.errors import CvxError, FormatError
from cvx_core.interfaces import Reader, Row
from cvx_io.clips import Facts, facts_of, is_still, read_still
from cvx_io.members import open_binary

THUMBNAIL = 160  # pixels, longer side
AT_ONCE = 16  # frames of a clip that are in memory
_context = multiprocessing.get_context("forkserver")


class Decoded(NamedTuple):
    """Of one file whose every frame was decoded. digest: SHA-256 of its bytes; thumbnail: JPEG of the middle
    frame.
    """

    facts: Facts
    digest: str
    thumbnail: bytes


def decode(row: Row, reader: Reader) -> Decoded:
    """Decode every frame of a row's clip. Raises FormatError at the first that cannot be, naming the file."""
    path = row.video if row.video is not None else row.image
    if row.make is not None:
        frames = row.make(9, 96, 160)
        return Decoded(Facts(2, 1, 9, 16, is_drawn=True), row.id, _thumbnail(frames[len(frames) // 2]))
    if path is None:
        raise FormatError(f"row {row.id!r} has neither video nor image. Drop it, or use a dataset of clips.")
    if is_still(path):
        pixels = read_still(path)
        return Decoded(Facts(1, 1, *pixels.shape[:2]), _digest(path), _thumbnail(pixels))
    if hasattr(reader, "check"):
        reader.check(path)
    with closing(reader.open(path)) as clip:
        count, middle = clip.num_frames, b""
        for first in range(0, count, AT_ONCE):
            indices = range(first, min(first + AT_ONCE, count))
            frames = clip.frames(indices)
            if count // 2 in indices:
                middle = _thumbnail(frames[count // 2 - first])
        return Decoded(facts_of(clip), _digest(path), middle)


def _thumbnail(pixels: Any) -> bytes:
    image = Image.fromarray(np.asarray(pixels))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    return buffer.getvalue()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open_binary(path) as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def decode_all(
    rows: Sequence[Row], reader: Reader, jobs: int = 1, timeout_s: float = 300
) -> Generator[Decoded | FormatError, None, None]:
    """Yield what each row decodes to, in order, or why it does not. jobs: processes; timeout_s: per file."""
    here = threading.local()
    started: list[_Process] = []

    def one(row: Row) -> Decoded | FormatError:
        if not hasattr(here, "process"):
            here.process = _Process(reader, timeout_s)
            started.append(here.process)
        result: Decoded | FormatError = here.process.decode(row)
        return result

    try:
        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(one, rows)
    finally:
        for process in started:
            process.end()


class _Process:
    """A process that decodes one file after the other, and is replaced when it dies."""

    def __init__(self, reader: Reader, timeout_s: float):
        self._reader, self._timeout_s = reader, timeout_s
        self._process: Any = None

    def decode(self, row: Row) -> Decoded | FormatError:
        file = row.video if row.video is not None else row.image
        try:
            if self._process is None:
                self._start()
            self._pipe.send(row)
            if not self._pipe.poll(self._timeout_s):
                self.end()
                return FormatError(
                    f"{file}: is not decoded after {self._timeout_s:g} s. Write it anew or drop it."
                )
            result: Decoded | FormatError = self._pipe.recv()
            return result
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            self.end()
            return FormatError(
                f"{file}: crashes the decoder (exit code {code}). Write it anew or drop its row."
            )

    def _start(self) -> None:
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(theirs, self._reader), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._pipe.recv()  # that it runs: what it imports first is no file's fault
        except EOFError as error:
            self._process.join()
            code = self._process.exitcode
            self.end()
            raise CvxError(
                f"the process that decodes does not start (exit code {code}); it says why above. Is the "
                "reader's package installed, and its class at the top of a module?"
            ) from error

    def end(self) -> None:
        """Stop the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe: Any, reader: Reader) -> None:
    """Say that this process runs, then answer rows until the other side is gone."""
    pipe.send(None)
    while True:
        try:
            row = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(decode(row, reader))
        except FormatError as error:
            pipe.send(FormatError(str(error)))
        except Exception as error:
            pipe.send(
                FormatError(f"{row.video or row.image}: {type(error).__name__}: {error}. Drop its row.")
            )
