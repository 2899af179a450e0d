"""`cvx data convert`: every layout to a data.jsonl that lists the same clips with the same captions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cvx_core import cli
from cvx_core.interfaces import Row
from cvx_io.data_convert import list_rows
from tests.plugins.datasets import test_conformance as layouts


def convert(*words: object) -> int:
    return cli.main(["data", "convert", *map(str, words)])


def essence(rows: tuple[Row, ...]) -> list[tuple]:
    return [(row.captions, row.video, row.image) for row in rows]


@pytest.mark.parametrize(
    ("kind", "prepare"),
    [
        ("prompts-videos", layouts.prompts_videos),
        ("csv", layouts.csv),
        ("jsonl", layouts.jsonl),
        ("annotation", layouts.annotation),
        ("folder", layouts.pairs),
        ("hf-folder", layouts.hub_csv),
        ("webdataset", layouts.shards),
    ],
)
def test_a_converted_listing_lists_the_same(
    kind: str, prepare: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fields = prepare(tmp_path)
    assert convert(*fields.values(), tmp_path / "data.jsonl") == 0
    assert f"data.jsonl: {3 if kind == 'webdataset' else 2} rows of {kind}" in capsys.readouterr().out
    before, _ = list_rows(kind, fields)
    after, _ = list_rows("jsonl", {"path": tmp_path / "data.jsonl"})
    assert essence(after) == essence(before)
    assert [row.id for row in after] == [row.id for row in before]


def test_a_folder_of_prompts_and_videos_is_recognised(tmp_path: Path) -> None:
    layouts.prompts_videos(tmp_path)
    (tmp_path / "prompts.txt").rename(tmp_path / "prompt.txt")
    (tmp_path / "prompt.txt").write_text('a "quoted" cat\n\u7c73\u8001\u9f20\n', encoding="utf-8")
    assert convert(tmp_path, tmp_path / "data.jsonl") == 0
    lines = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {"file": "a.mp4", "captions": 'a "quoted" cat', "id": "a.mp4#1"},
        {"file": "b.mp4", "captions": "\u7c73\u8001\u9f20", "id": "b.mp4#2"},
    ]


def test_fields_name_what_a_table_calls_otherwise(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "x.csv").write_text("clip,text\na.mp4,A\n")
    fields = ["--field", "video_column=clip", "--field", "caption_column=text"]
    assert convert(tmp_path / "x.csv", tmp_path / "data.jsonl", *fields) == 0
    assert convert(tmp_path / "x.csv", tmp_path / "b.jsonl", "--from", "csv", *fields) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prompt.txt", "videos.txt"], "absent.mp4' does not exist"),
        (["nothing.txt"], "no listing that is known"),
        (["prompt.txt", "videos.txt", "--field", "colour=red"], "'prompts-videos' has no field 'colour'"),
        (["prompt.txt", "--from", "prompts"], "has no file of a clip"),
        (["latin.txt", "videos.txt"], "latin.txt:1: byte 0xe9 is not UTF-8"),
        (["prompt.txt", "one.txt"], "has 2 prompts and .*one.txt has 1 videos"),
    ],
)
def test_what_cannot_be_converted_is_said_and_nothing_is_written(
    words: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").touch()
    (tmp_path / "prompt.txt").write_text("A\nB\n")
    (tmp_path / "videos.txt").write_text("a.mp4\nabsent.mp4\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\nB\n")
    (tmp_path / "one.txt").write_text("a.mp4\n")
    at = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    assert convert(*words[:at], "data.jsonl", *words[at:]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "data.jsonl").exists()


def test_bad_lines_are_left_out_only_when_asked_and_a_file_is_replaced_only_when_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "prompt.txt").write_text("A\nB\n")
    (tmp_path / "videos.txt").write_text("a.mp4\nabsent.mp4\n")
    target = tmp_path / "data.jsonl"
    assert convert(tmp_path, target, "--skip-bad") == 0
    said = capsys.readouterr().out
    assert "left out" in said
    assert "absent.mp4" in said
    assert "1 rows of prompts-videos, 1 problems left out" in said
    before = target.read_bytes()
    assert convert(tmp_path, target, "--skip-bad") == 2
    assert "replace it by --force" in capsys.readouterr().err
    assert convert(tmp_path, target, "--skip-bad", "--force") == 0
    assert target.read_bytes() == before
