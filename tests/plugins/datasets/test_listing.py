"""What the datasets read, and how they report what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvx_core import Registry
from cvx_core.errors import FormatError
from cvx_core.interfaces import Row

Rows = Callable[..., tuple[Row, ...]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    registry = Registry.discover()

    def listed(name: str, **fields: Any) -> tuple[Row, ...]:
        component = registry.get("dataset", name)
        assert component.config is not None
        return component.load()(component.config(**fields), None).rows()

    return listed


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder with the files a.mp4, b.mp4 and a.png."""
    for name in ("a.mp4", "b.mp4", "a.png"):
        (tmp_path / name).touch()
    return tmp_path


def test_jsonl_gives_captions_image_and_meta(rows: Rows, media: Path) -> None:
    lines = [
        {"file": "a.mp4", "captions": "A", "image": "a.png", "score": 0.5},
        {"file": str(media / "b.mp4"), "captions": ["B", "C"], "id": "second"},
    ]
    index = media / "index.jsonl"
    index.write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    first, second = rows("jsonl", path=index)
    assert first == Row("a.mp4#1", ("A",), media / "a.mp4", media / "a.png", meta={"score": 0.5})
    assert (second.id, second.captions, second.video) == ("second", ("B", "C"), media / "b.mp4")


def test_jsonl_reads_the_reference_conversion(rows: Rows, shared: Path, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "b c.mp4"):
        (tmp_path / "videos" / name).touch()
    found = rows("jsonl", path=shared / "fixtures/megatron/golden/lora_dataset/data.jsonl", root=tmp_path)
    assert [row.captions for row in found] == [
        ('A cat "quoted" runs.',),
        ("\u7c73\u8001\u9f20\u5728\u8df3\u821e",),
    ]
    assert [row.video.name for row in found if row.video] == ["a.mp4", "b c.mp4"]


def test_jsonl_takes_other_key_names(rows: Rows, media: Path) -> None:
    index = media / "index.jsonl"
    index.write_text(json.dumps({"path": "a.mp4", "cap": ["A"]}))
    (row,) = rows("jsonl", path=index, video_key="path", caption_key="cap")
    assert (row.captions, row.video) == (("A",), media / "a.mp4")


def test_jsonl_reports_every_problem_with_its_line(rows: Rows, media: Path) -> None:
    index = media / "index.jsonl"
    bad = ['{"file": "gone.mp4", "captions": "A"}', "{", "[1]", '{"fil": "a.mp4", "captions": "A"}']
    bad += ['{"file": "a.mp4", "captions": []}', '{"file": "a.mp4", "captions": " "}']
    index.write_text("\n".join(bad))
    with pytest.raises(FormatError) as error:
        rows("jsonl", path=index)
    text = str(error.value)
    for line, words in enumerate(
        ("gone.mp4", "JSON", "object", "Did you mean 'fil'", "list", "blank"), start=1
    ):
        assert any(part.startswith(f"{index}:{line}:") and words in part for part in text.split("\n")), words
    assert "6 problems" in text


def test_only_twenty_problems_are_shown_and_all_counted(rows: Rows, media: Path) -> None:
    index = media / "index.jsonl"
    index.write_text("\n".join(json.dumps({"file": f"{i}.mp4", "captions": "A"}) for i in range(33)))
    with pytest.raises(FormatError, match=r"and 13 more\n33 problems") as error:
        rows("jsonl", path=index)
    assert str(error.value).count("does not exist") == 20


def test_an_id_given_twice_names_both_lines(rows: Rows, media: Path) -> None:
    index = media / "index.jsonl"
    index.write_text("\n".join(json.dumps({"file": "a.mp4", "captions": "A", "id": "x"}) for _ in range(2)))
    with pytest.raises(FormatError, match=r"index.jsonl:2: id 'x' is taken by line 1"):
        rows("jsonl", path=index)


@pytest.mark.parametrize("name", ["jsonl", "csv"])
def test_other_encodings_are_an_error_with_the_line(rows: Rows, media: Path, name: str) -> None:
    index = media / "index"
    index.write_bytes(b"video,caption\na.mp4,caf\xe9\n")
    with pytest.raises(FormatError, match=r"index:2: byte 0xe9 is not UTF-8.*iconv"):
        rows(name, path=index)


def test_a_byte_order_mark_is_no_part_of_the_text(rows: Rows, media: Path) -> None:
    index = media / "index.csv"
    index.write_bytes(b"\xef\xbb\xbfvideo,caption\r\na.mp4,A\r\n")
    assert rows("csv", path=index)[0].captions == ("A",)


@pytest.mark.parametrize(("name", "text"), [("jsonl", "\n"), ("csv", "video,caption\n")])
def test_an_index_without_rows_is_an_error(rows: Rows, media: Path, name: str, text: str) -> None:
    (media / "index").write_text(text)
    with pytest.raises(FormatError, match="lists no rows"):
        rows(name, path=media / "index")


def test_csv_takes_other_columns_and_newlines_in_cells(rows: Rows, media: Path) -> None:
    index = media / "index.csv"
    index.write_text('clip;text;fps\na.mp4;"two\nlines";8\nb.mp4;B;9\n')
    first, second = rows("csv", path=index, video_column="clip", caption_column="text", delimiter=";")
    assert (first.captions, first.meta) == (("two\nlines",), {"fps": "8"})
    assert second.id == "b.mp4#4"


def test_csv_reports_header_and_cells(rows: Rows, media: Path) -> None:
    index = media / "index.csv"
    index.write_text("video,captoin\na.mp4,A\n")
    with pytest.raises(FormatError, match=r":1: no column 'caption'.*Did you mean 'captoin'"):
        rows("csv", path=index)
    index.write_text("video,caption\na.mp4,A, B\n")
    with pytest.raises(FormatError, match=r":2: has 3 cells, the header has 2"):
        rows("csv", path=index)


def test_pairs_keep_only_newlines_as_separators(rows: Rows, media: Path) -> None:
    (media / "prompts.txt").write_text(" one\u2028line \r\nB\n", encoding="utf-8")
    (media / "videos.txt").write_text("a.mp4 \nb.mp4")
    found = rows("prompts-videos", prompts=media / "prompts.txt", videos=media / "videos.txt")
    assert [(row.captions, row.video) for row in found] == [
        (("one\u2028line",), media / "a.mp4"),
        (("B",), media / "b.mp4"),
    ]


def test_unequal_pairs_name_both_counts(rows: Rows, shared: Path) -> None:
    source = shared / "fixtures/megatron/src/lora_dataset"
    with pytest.raises(FormatError, match=r"prompt.txt has 2 prompts and .*videos.txt has 3 videos"):
        rows("prompts-videos", prompts=source / "prompt.txt", videos=source / "videos.txt")


def test_blank_lines_are_an_error_in_either_file(rows: Rows, media: Path) -> None:
    (media / "prompts.txt").write_text("A\n\n")
    (media / "videos.txt").write_text("\nb.mp4\n")
    with pytest.raises(FormatError) as error:
        rows("prompts-videos", prompts=media / "prompts.txt", videos=media / "videos.txt")
    assert "videos.txt:1: blank line" in str(error.value)
    assert "prompts.txt:2: blank line" in str(error.value)


def test_prompts_come_from_the_recipe_with_images(rows: Rows, media: Path) -> None:
    found = rows("prompts", prompts=("A", "B"), images=(media / "a.png", media / "a.png"))
    assert [(row.id, row.captions, row.image) for row in found] == [
        ("prompt#1", ("A",), media / "a.png"),
        ("prompt#2", ("B",), media / "a.png"),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either a text file"),
        ({"prompts": ("A", " ")}, "blank line"),
        ({"prompts": ("A", "B"), "images": ("a.png",)}, "2 prompts and dataset.images has 1 images"),
        ({"prompts": ("A",), "images": ("gone.png",)}, "gone.png"),
    ],
)
def test_prompts_that_do_not_fit_are_an_error(rows: Rows, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        rows("prompts", **fields)


def test_synthetic_videos_move_and_follow_the_seed(rows: Rows) -> None:
    first, other = rows("synthetic", rows=4), rows("synthetic", rows=4, seed=1)
    assert [row.captions for row in first] != [row.captions for row in other]
    assert first == rows("synthetic", rows=9)[:4]
    for row in first:
        assert row.make is not None
        video = row.make(5, 32, 48)
        assert np.abs(np.diff(video.astype(int), axis=0)).max(axis=(1, 2, 3)).min() > 20, (
            "every frame differs"
        )
