"""Encode every row once, into a feature cache: what is there already is kept, whatever ends a run."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from cvx_core.errors import CvxError, FormatError
from cvx_core.interfaces import Deps, Parts
from cvx_core.spec import Spec
from cvx_io.atomic import write_json, write_text
from cvx_io.cache.claims import Claims
from cvx_io.cache.digests import Digests
from cvx_io.cache.items import write_item
from cvx_io.cache.rows import Listed, files_of, write_rows
from cvx_io.progress import progress
from cvx_io.video import Item, Pick, read_row
from cvx_plugins.tasks import PrecomputeConfig
from cvx_plugins.tasks.encode import Encoder
from cvx_plugins.tasks.worklist import Wanted, Worklist, shared_by

log = logging.getLogger("cvx")
SHOWN = 10
WAIT_S = 0.2
"""Between looks at items that other processes are working on."""


class Precompute:
    """The `precompute` task. Processes that share an output folder share the work, ranks of one run too."""

    def __init__(self, config: PrecomputeConfig, deps: Deps):
        self._config = config
        self._failed: dict[str, str] = {}

    def prepare(self, parts: Parts, spec: Spec) -> Parts:
        """Encode without pixel noise: it could not be another one each time a row is read."""
        return replace(parts, encoder=Encoder(parts, spec.card, image_noise=None))

    def run(self, parts: Parts, spec: Spec) -> None:
        """Encode what is missing, then write the list of rows.

        Raises FormatError naming the rows that could not be read; all others are kept.
        """
        began, folder = time.perf_counter(), spec.output
        with closing(Claims(folder)) as claims:
            if not claims.attend():
                raise FormatError(f"{folder}: is being pruned. Wait until that has finished.")
            digests = Digests(folder / "digests.json")
            shared = shared_by(spec, digests, parts.encoder.scale)
            rows = parts.dataset.rows()
            before = (folder, self._config.rows)
            work = Worklist(before, shared, rows, digests, spec.card, parts.mesh)
            digests.save()
            for line in work.report():
                log.info("%s", line)
            parts.mesh.barrier()  # nothing is made before every rank knows what is missing
            self._make(work, parts, spec, claims)
            parts.mesh.barrier()
            if parts.mesh.is_first:
                self._finish(work, spec, time.perf_counter() - began)

    def _make(self, work: Worklist, parts: Parts, spec: Spec, claims: Claims) -> None:
        """Encode every missing item, or see it made by another process."""
        with (
            progress("encode", len(work.missing)) as bar,
            ThreadPoolExecutor(max(1, self._config.workers)) as threads,
        ):
            ahead = _Ahead(work, claims, Pixels.of(spec), threads, self._config.workers, parts.mark)
            began, made = time.perf_counter(), 0
            try:
                for wanted, future in ahead.items(self._failed):
                    if future is not None:
                        self._encode(wanted, future, work, parts)
                        claims.give(wanted.key)
                        made += 1
                    bar.step(f"{made / max(time.perf_counter() - began, 1e-9):.2f} items/s")
            finally:
                threads.shutdown(wait=True, cancel_futures=True)

    def _encode(self, wanted: Wanted, future: Future[Item], work: Worklist, parts: Parts) -> None:
        """Write one item; what cannot be read or encoded is noted, and the rest goes on."""
        try:
            tensors = self._tensors(wanted, future.result(), parts.encoder)
            write_item(work.folder, wanted.kind, wanted.ingredients, tensors)
        except FormatError as error:
            where = f"row {wanted.row.id!r}: " if repr(wanted.row.id) not in str(error) else ""
            self._failed[wanted.key] = f"{where}{error}"

    def _tensors(self, wanted: Wanted, item: Item, encoder: Encoder) -> Sequence[Any]:
        if wanted.kind == "text":
            return encoder.unconditional() if wanted.caption is None else encoder.texts([wanted.caption])[0]
        pixels = item.video if wanted.kind == "latent" else None
        if wanted.kind == "image_latent" and item.image is not None:
            pixels = item.image[:, None]
        if pixels is None:
            raise FormatError("has neither video nor image. Drop it, or use a dataset of clips.")
        return encoder.moments(pixels[None])[0]

    def _finish(self, work: Worklist, spec: Spec, seconds: float) -> None:
        """Write the list of the rows that are complete, if it may lack any, and say what was done."""
        lost = [row for row in work.rows if any(key in self._failed for key in _keys(row))]
        failed = {**work.unread, **self._failed}
        rows = [row for row in work.rows if row not in lost]
        if failed and (self._config.unreadable == "error" or not rows):
            raise FormatError(_failures(failed))
        if failed:
            log.warning("%d rows are left out:\n%s", len(lost) + len(work.unread), _failures(failed))
        absent = [path for _, path in files_of(work.folder, work.shared, rows) if not path.is_file()]
        if absent:
            raise CvxError(f"{len(absent)} items vanished meanwhile, first {absent[0]}. Run it again.")
        write_rows(work.folder, self._config.rows, work.shared, rows)
        write_text(work.folder / "recipe.resolved.yaml", spec.to_yaml())
        account = {**work.account(), "rows": len(rows), "left_out": [*work.unread, *(row.id for row in lost)]}
        write_json(work.folder / "precompute.json", {**account, "digest": spec.digest, "seconds": seconds})
        log.info("%d rows in %s; train with dataset: {use: feature-cache, path: ...}", len(rows), work.folder)


@dataclass(frozen=True)
class Pixels:
    """Reads what an item is encoded from; called in threads."""

    reader: Any
    pick: Pick
    height: int
    width: int

    @classmethod
    def of(cls, spec: Spec) -> Pixels:
        video = spec.video
        pick = Pick(video.frames, video.fps, video.rule, video.start, video.skip, video.short)
        return cls(spec.choices["reader"].build(Deps(spec)), pick, video.height, video.width)

    def __call__(self, wanted: Wanted) -> Item:
        """Return the pixels of an item. Raises FormatError."""
        row = wanted.row
        if wanted.kind == "text":
            return Item()
        if wanted.kind == "image_latent" and row.image is not None:
            row = replace(row, video=None, make=None)
        return read_row(row, self.reader, self.pick, self.height, self.width)


class _Ahead:
    """Claims items and decodes some ahead of the encoder."""

    def __init__(
        self,
        work: Worklist,
        claims: Claims,
        read: Callable[[Wanted], Item],
        threads: ThreadPoolExecutor,
        count: int,
        mark: Callable[[str], None],
    ):
        self._work, self._claims, self._read, self._threads = work, claims, read, threads
        self._count, self._mark = count, mark

    def items(self, failed: dict[str, str]) -> Iterator[tuple[Wanted, Future[Item] | None]]:
        """Yield every missing item once: with its pixels to come, or None where another process made it."""
        ready: deque[tuple[Wanted, Future[Item]]] = deque()
        left = deque(self._work.missing)
        while left or ready:
            busy: deque[Wanted] = deque()
            while left:
                wanted = left.popleft()
                if self._work.has(wanted):
                    yield wanted, None
                elif not self._claims.take(wanted.key):
                    busy.append(wanted)
                elif self._work.has(wanted):  # made between the two looks
                    self._claims.give(wanted.key)
                    yield wanted, None
                else:
                    ready.append((wanted, self._submit(wanted)))
                if len(ready) > self._count:
                    yield self._next(ready)
            while ready:
                yield self._next(ready)
            if busy:
                self._mark("waiting for items of other processes")
                time.sleep(WAIT_S)
            left = busy

    def _next(self, ready: deque[tuple[Wanted, Future[Item]]]) -> tuple[Wanted, Future[Item]]:
        self._mark("encoding")
        return ready.popleft()

    def _submit(self, wanted: Wanted) -> Future[Item]:
        if self._count:
            return self._threads.submit(self._read, wanted)
        future: Future[Item] = Future()
        try:
            future.set_result(self._read(wanted))
        except FormatError as error:
            future.set_exception(error)
        return future


def _keys(row: Listed) -> tuple[str, ...]:
    return (*row.items.values(), *row.texts)


def _failures(failed: dict[str, str]) -> str:
    unique = list(Counter(failed.values()))
    more = f"\n... and {len(unique) - SHOWN} more" if len(unique) > SHOWN else ""
    return (
        "\n".join(unique[:SHOWN])
        + f"{more}\n{len(failed)} items could not be made; all others are kept. Replace these files or drop "
        "their rows, and run it again; or set task.unreadable: skip."
    )
