"""What every dataset must satisfy: it lists what exists, the same on every call, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cvx_core.config import path_fields
from cvx_core.errors import FormatError
from cvx_core.registry import Registry
from cvx_core.testing import Suite

_LIST = """
import json, sys
from cvx_core.registry import Registry
component = Registry.discover().get("dataset", sys.argv[1])
rows = component.load()(component.config(**json.loads(sys.argv[2])), None).rows()
heavy = {"torch", "av", "decord", "numpy"} & set(sys.modules)
sys.exit(f"listing imports {sorted(heavy)}" if heavy else 0)
"""


def suite(name: str, prepare: Callable[[Path], Mapping[str, Any]] | None = None, **fields: Any) -> Suite:
    """Return the checks of dataset `name`, made with `fields` on top of its preset.

    prepare: writes the files the dataset lists into an empty folder, and returns further fields.
    """

    def fields_in(folder: Path) -> dict[str, Any]:
        return {
            **Registry.discover().get("dataset", name).preset,
            **fields,
            **(prepare(folder) if prepare else {}),
        }

    def made(values: Mapping[str, Any]) -> Any:
        component = Registry.discover().get("dataset", name)
        assert component.config is not None
        return component.load()(component.config(**values), None)

    def rows_are_the_same_on_every_call(tmp_path: Path) -> None:
        values = fields_in(tmp_path)
        dataset = made(values)
        first = dataset.rows()
        assert len(first) > 0
        assert list(dataset.rows()) == list(first) == list(made(values).rows())

    def ids_are_unique_and_not_empty(tmp_path: Path) -> None:
        ids = [row.id for row in made(fields_in(tmp_path)).rows()]
        assert all(isinstance(row_id, str) and row_id for row_id in ids)
        assert len(set(ids)) == len(ids)

    def captions_are_texts(tmp_path: Path) -> None:
        for row in made(fields_in(tmp_path)).rows():
            assert isinstance(row.captions, tuple)
            assert all(isinstance(caption, str) for caption in row.captions), row

    def media_exist_by_absolute_path(tmp_path: Path) -> None:
        for row in made(fields_in(tmp_path)).rows():
            for path in (row.video, row.image):
                assert path is None or (path.is_absolute() and _is_there(path)), row

    def drawn_videos_have_the_size_asked_for(tmp_path: Path) -> None:
        for row in list(made(fields_in(tmp_path)).rows())[:2]:
            if row.make is not None:
                video = row.make(3, 16, 24)
                assert (video.shape, str(video.dtype)) == ((3, 16, 24, 3), "uint8")
                assert (video == row.make(3, 16, 24)).all()

    def listing_imports_no_torch(tmp_path: Path) -> None:
        values = json.dumps(fields_in(tmp_path), default=str)
        run = [sys.executable, "-c", _LIST, name, values]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def a_missing_file_is_named(tmp_path: Path) -> None:
        values = fields_in(tmp_path)
        config = Registry.discover().get("dataset", name).config
        assert config is not None
        for field in path_fields(config):
            if isinstance(values.get(field), str | Path) and Path(values[field]).is_file():
                absent = tmp_path / f"absent-{field}"
                with pytest.raises(FormatError, match=absent.name):
                    made({**values, field: absent}).rows()

    return Suite.of(
        name,
        rows_are_the_same_on_every_call,
        ids_are_unique_and_not_empty,
        captions_are_texts,
        media_exist_by_absolute_path,
        drawn_videos_have_the_size_asked_for,
        listing_imports_no_torch,
        a_missing_file_is_named,
    )


def _is_there(path: Path) -> bool:
    """Tell whether a path is a file, or that of a member within one, such as a shard."""
    return path.is_file() or any(parent.is_file() for parent in path.parents)
