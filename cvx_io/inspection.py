"""What training would make of every clip: its bucket or why it is dropped, and what is worth a look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cvx_core.errors import FormatError, ListingError
from cvx_core.interfaces import Deps, Row
from cvx_core.spec import Spec
from cvx_io.buckets import Offer, Rules, Sorting, sort_rows
from cvx_io.clips import Facts
from cvx_io.decoding import Decoded, decode_all
from cvx_io.progress import progress
from cvx_io.video import Pick


@dataclass(frozen=True)
class Finding:
    """One row. bucket: None where it is dropped, with the reason; tokens: of its longest caption; notes: what
    is worth a look although the row is kept; duplicate: the first row with the same bytes.
    """

    row: str
    file: str
    frames: int | None = None
    fps_in: float | None = None
    fps_out: float | None = None
    height: int | None = None
    width: int | None = None
    bucket: str | None = None
    reason: str = ""
    caption: str = ""
    tokens: int | None = None
    token_limit: int | None = None
    duplicate: str = ""
    notes: tuple[str, ...] = ()
    thumbnail: bytes = b""

    @property
    def is_kept(self) -> bool:
        return self.bucket is not None


@dataclass(frozen=True)
class Inspection:
    """Of a recipe's dataset. source: the recipe; max_drop: the share of dropped rows that training allows."""

    source: str
    findings: tuple[Finding, ...]
    max_drop: float

    @property
    def dropped(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.is_kept]

    @property
    def is_over(self) -> bool:
        """Whether more rows are dropped than the recipe allows."""
        return len(self.dropped) > self.max_drop * len(self.findings)

    def summary(self) -> list[str]:
        """Return lines: rows kept and dropped, by bucket and reason, duplicates, long captions."""
        kept = [finding for finding in self.findings if finding.is_kept]
        lines = [f"{len(self.findings)} rows: {len(kept)} kept, {len(self.dropped)} dropped"]
        buckets = Counter(finding.bucket for finding in kept)
        lines += [f"  {count} in {bucket}" for bucket, count in sorted(buckets.items(), key=str)]
        reasons = Counter(finding.reason.partition(":")[0] for finding in self.dropped)
        lines += [f"  {count} dropped: {reason}" for reason, count in reasons.items()]
        notes = Counter(note.partition(":")[0] for finding in self.findings for note in finding.notes)
        return lines + [f"  {count} noted: {note}" for note, count in notes.items()]


def inspect(spec: Spec, jobs: int = 1, timeout_s: float = 300) -> Inspection:
    """Decode every file of a recipe's dataset, each once, and say what training would do with it."""
    rows, problems = _listed(spec)
    reader = spec.choices["reader"].build(Deps(spec)) if "reader" in spec.choices else None
    if reader is None:
        raise FormatError("the recipe has no reader, so there is nothing to decode its clips with.")
    results: list[Decoded | FormatError] = []
    with progress("decode", len(rows)) as bar:
        for result in decode_all(rows, reader, jobs, timeout_s):
            results.append(result)
            bar.step()
    facts = [result if isinstance(result, FormatError) else result.facts for result in results]
    sorting = sort_rows(facts, _rules(spec))
    tokens = _tokens(spec, rows)
    seen: dict[str, str] = {}
    findings = []
    for index, (row, result) in enumerate(zip(rows, results, strict=True)):
        findings.append(_finding(spec, row, result, sorting.offers[index], sorting, tokens[index], seen))
    findings += [Finding(place, "", reason=f"not listed: {text}") for place, text in problems]
    config = spec.loader
    allowed = config.max_drop if config.max_drop is not None else 0.1 if config.buckets is not None else 0.0
    return Inspection(spec.recipe.source, tuple(findings), allowed)


def _listed(spec: Spec) -> tuple[Sequence[Row], Sequence[tuple[str, str]]]:
    """Return the rows that can be listed, and (place, message) of what cannot."""
    try:
        return spec.choices["dataset"].build(Deps(spec)).rows(), ()
    except ListingError as error:
        return error.rows, error.problems


def _tokens(spec: Spec, rows: Sequence[Row]) -> list[int | None]:
    """Return the tokens of every row's longest caption; None where the recipe's text encoder cannot tell."""
    count = getattr(spec.config("text_encoder"), "token_counts", None)
    if count is None:
        return [None] * len(rows)
    numbers = iter(count([caption for row in rows for caption in row.captions]))
    return [max((next(numbers) for _ in row.captions), default=0) for row in rows]


def _rules(spec: Spec) -> Rules:
    """Return the recipe's buckets; without any, the one that its `video` states, which takes every size."""
    video, loader = spec.video, spec.loader
    pick = Pick(video.frames, video.fps, video.rule, video.start, video.skip, video.short)
    if loader.buckets is not None:
        return Rules(loader.buckets, loader.aspects, spec.card.size_step, loader.enlarge, pick)
    table = {f"{video.height}x{video.width}": {video.frames: (1.0, loader.batch)}}
    return Rules(table, loader.aspects, spec.card.size_step, float("inf"), pick)


def _finding(
    spec: Spec,
    row: Row,
    result: Decoded | FormatError,
    offer: Offer,
    sorting: Sorting,
    tokens: int | None,
    seen: dict[str, str],
) -> Finding:
    limit = getattr(spec.config("text_encoder"), "max_length", None)
    bucket = sorting.buckets[offer.buckets[0]] if offer.buckets else None
    notes = [] if all(caption.strip() for caption in row.captions) and row.captions else ["empty caption"]
    if tokens is not None and limit is not None and tokens > limit:
        notes.append(f"long caption: {tokens} tokens are cut to {limit}")
    if bucket is not None and bucket.keep < 1:
        others = ", ".join(sorting.buckets[i].name for i in offer.buckets[1:]) or "none"
        notes.append(f"keep_prob: stays with probability {bucket.keep:g}, else goes on to: {others}")
    facts = Facts(0, 0, 0, 0)
    duplicate, thumbnail = "", b""
    if isinstance(result, Decoded):
        facts, thumbnail = result.facts, result.thumbnail
        duplicate = seen.setdefault(result.digest, row.id)
        duplicate = "" if duplicate == row.id else duplicate
        if duplicate:
            notes.append(f"duplicate: the same bytes as {duplicate}")
        if facts.times is not None:
            notes.append(f"variable frame rate: about {facts.fps:g} fps; frames are picked by their times")
    known: dict[str, Any] = {}
    if facts.num_frames and not facts.is_drawn:
        known = {
            "frames": facts.num_frames,
            "fps_in": round(facts.fps, 4),
            "fps_out": spec.video.fps,
            "height": facts.height,
            "width": facts.width,
        }
    return Finding(
        row=row.id,
        file=str(row.video or row.image or ""),
        bucket=bucket.name if bucket is not None else None,
        reason=f"{offer.reason}: {offer.detail}" if bucket is None else "",
        caption=row.captions[0] if row.captions else "",
        tokens=tokens,
        token_limit=limit,
        duplicate=duplicate,
        notes=tuple(notes),
        thumbnail=thumbnail,
        **known,
    )
