"""Refusing features that are not what the recipe's encoders would make of the files now. Builds nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cvx_core.errors import FormatError
from cvx_core.spec import Spec
from cvx_io.cache.digests import Digests
from cvx_io.cache.rows import Listed, Shared
from cvx_plugins.tasks.origins import differences, encoder_of, none_of, video_of

log = logging.getLogger("cvx")
SHOWN = 5


def check_cache(dataset: Any, spec: Spec) -> None:
    """Compare a feature cache with the recipe and with its source files, where these are at hand.

    Sections and files that are not there are not compared, and that is said. Another dataset passes. Raises
    FormatError with every difference.
    """
    if "autoencoder" not in getattr(spec.config("dataset"), "replaces", ()):
        return
    shared: Shared | None = getattr(dataset, "shared", None)
    if shared is None:
        log.warning(
            "%s: its files do not say what they were made with; only shapes and fps are compared",
            spec.name_of("dataset"),
        )
        return
    digests = Digests(dataset.folder / "digests.json")
    found = [*_of_recipe(shared, spec, digests), *_of_files(shared, dataset.listed, digests)]
    digests.save()
    if found:
        more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise FormatError(
            f"{dataset.folder}: the cache is stale, so training would not be on what the recipe says:\n  "
            + "\n  ".join(found[:SHOWN])
            + f"{more}\nRun the precompute task again (it makes only what changed), or undo the change."
        )


def _of_recipe(shared: Shared, spec: Spec, digests: Digests) -> Iterator[str]:
    """Yield how the recipe's geometry and encoders differ from those the cache was made with."""
    before = {f"video.{name}": value for name, value in shared.video.items()}
    yield from differences(before, {f"video.{name}": value for name, value in video_of(spec).items()})
    for section, recorded in (("autoencoder", shared.autoencoder), ("text_encoder", shared.text_encoder)):
        if section in spec.choices:
            yield from differences(recorded, encoder_of(spec, section, digests))
            if section == "text_encoder":
                yield from differences(shared.none, none_of(spec))
        else:
            log.info("%s: as the cache has it (%s)", section, recorded[f"{section}.use"])
            yield from _of_card(section, recorded, spec)


def _of_card(section: str, recorded: Any, spec: Spec) -> Iterator[str]:
    """Yield what the predictor needs, and an encoder that the recipe does not state has not."""
    for (owner, name), needed in spec.card.demands().items():
        value = recorded.get(f"{section}.{name}", needed)
        if owner == section and value != needed:
            yield f"{section}.{name} {value}, but predictor {spec.name_of('predictor')!r} needs {needed}"


def _of_files(shared: Shared, listed: list[Listed], digests: Digests) -> Iterator[str]:
    """Yield which source files have changed since. Those that are not there any more are counted."""
    gone = 0
    for path, digest in shared.files.items():
        if not Path(path).is_file():
            gone += 1
        elif digests.of(Path(path)) != digest:
            yield f"{path} changed: rows or captions may be others"
    for row in listed:
        for kind, source in sources_of(row).items():
            if not source.is_file():
                gone += 1
            elif digests.of(source) != row.digests[kind]:
                yield f"row {row.id!r}: {source} changed"
    if gone:
        log.warning("%d source files are not here, so whether they changed since is not known", gone)


def sources_of(row: Listed) -> dict[str, Path]:
    """Return the file that each item of a row, its captions aside, was made from; none of drawn rows."""
    found = {"latent": row.sources.get("video"), "image_latent": row.sources.get("image")}
    return {kind: Path(source) for kind, source in found.items() if source is not None and kind in row.items}
