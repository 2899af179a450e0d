"""What the layouts of others read: nested annotations, folders, hub folders, shards; and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cvx_core import Registry
from cvx_core.errors import FormatError, ListingError
from cvx_core.interfaces import Row
from cvx_io.clips import probe
from cvx_io.decoding import decode
from cvx_io.members import is_there
from cvx_io.video import Pick, read_row
from tests.plugins.datasets.test_conformance import annotation, hub, hub_csv, pairs, write_shard


def listed(kind: str, **fields) -> tuple[Row, ...]:
    component = Registry.discover().get("dataset", kind)
    assert component.config is not None
    rows: tuple[Row, ...] = component.load()(component.config(**fields), None).rows()
    return rows


def refused(kind: str, **fields) -> ListingError:
    with pytest.raises(FormatError) as error:
        listed(kind, **fields)
    assert isinstance(error.value, ListingError)
    return error.value


def test_nested_annotations_are_found_at_any_depth(tmp_path: Path) -> None:
    first, second = listed("annotation", **annotation(tmp_path))
    assert (first.id, first.captions, first.video) == ("a.mp4#1", ("A",), tmp_path / "a.mp4")
    assert (second.captions, second.video) == (("B", "C"), tmp_path / "nature/b.mp4")
    assert second.meta == {"resolution": {"height": 480, "width": 720}}


def test_bad_records_of_an_annotation_are_all_named_by_their_place(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    records = [
        {"path": "a.mp4", "cap": "A"},
        {"path": "a.mp4"},
        {"path": 3, "cap": "x"},
        "text",
        {"path": "absent.mp4", "cap": "x"},
        {"path": "a.mp4", "cap": []},
        {"file": "a.mp4"},
    ]
    (tmp_path / "x.json").write_text(json.dumps({"sets": records}))
    error = refused("annotation", path=tmp_path / "x.json")
    assert [row.id for row in error.rows] == ["a.mp4#1"]
    said = [message for _, message in error.problems]
    assert [message.partition(":")[0] for message in said] == [
        "sets[1]",
        "sets[2]",
        "sets[3]",
        "sets[4]",
        "sets[5]",
        "sets[6]",
        "sets[6]",
    ]
    assert "no key 'cap' among ['path']" in said[0]
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(FormatError, match=r"x.json:1: not valid JSON"):
        listed("annotation", path=tmp_path / "x.json")


def test_a_folder_pairs_clips_with_texts_of_the_same_stem(tmp_path: Path) -> None:
    rows = listed("folder", **pairs(tmp_path))
    assert [(row.id, row.captions) for row in rows] == [
        ("a.mp4", ("caption of a",)),
        ("in/b.mp4", ("caption of in/b",)),
    ]


def test_a_folder_names_everything_that_has_no_partner(tmp_path: Path) -> None:
    for name in ("alone.mp4", "twice.mp4", "twice.png", "blank.mp4", "latin.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "twice.txt").write_text("two")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "orphan.txt").write_text("no clip")
    error = refused("folder", path=tmp_path)
    assert [row.id for row in error.rows] == ["twice.mp4"]
    text = str(error)
    for part in (
        "alone.mp4: has no text",
        "twice.png: shares 'twice.txt' with 'twice.mp4'",
        "blank.txt: is blank",
        "latin.txt: byte 0xe9 is not UTF-8",
        "orphan.txt: has no clip",
    ):
        assert part in text, (part, text)


@pytest.mark.parametrize("prepare", [hub, hub_csv])
def test_hub_folders_are_read_from_either_metadata_file(tmp_path: Path, prepare) -> None:
    fields = prepare(tmp_path)
    rows = listed("hf-folder", **fields)
    assert [(row.captions, row.video) for row in rows] == [
        (("A",), tmp_path / "hub/a.mp4"),
        (("B",), tmp_path / "hub/b.mp4"),
    ]
    with pytest.raises(FormatError, match=r"no key 'caption'|no column 'caption'"):
        listed("hf-folder", caption_key="caption", **fields)
    (tmp_path / "hub/metadata.csv").write_text("file_name,text\n")
    (tmp_path / "hub/metadata.jsonl").write_text("{}")
    with pytest.raises(FormatError, match=r"has both of metadata.jsonl and metadata.csv. Keep one"):
        listed("hf-folder", **fields)


def test_a_hub_folder_without_metadata_says_where_there_is_some(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"has neither of .* Write one, with file_name and text"):
        listed("hf-folder", path=tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/metadata.csv").write_text("file_name,text\n")
    with pytest.raises(FormatError, match=rf"Set dataset.path to {tmp_path}/train\."):
        listed("hf-folder", path=tmp_path)


def test_clips_in_shards_are_decoded_where_they_lie(tmp_path: Path, shared: Path) -> None:
    clips = shared / "data/clips"
    files = {
        "a.webm": (clips / "gallery.webm").read_bytes()[:10],
        "a.txt": b"cut",
        "b.mp4": (clips / "hiker_tiny.mp4").read_bytes(),
        "b.txt": "caf\u00e9".encode(),
    }
    write_shard(tmp_path / "0.tar", files)
    cut, whole = listed("webdataset", path=tmp_path)
    assert (whole.id, whole.captions, whole.video) == ("0.tar/b", ("caf\u00e9",), tmp_path / "0.tar/b.mp4")
    component = Registry.discover().get("reader", "auto")
    assert component.config is not None
    reader = component.load()(component.config(prefer="decord"), None)
    plain = Row("p", video=clips / "hiker_tiny.mp4")
    assert probe(whole, reader) == probe(plain, reader)
    assert decode(whole, reader).digest == decode(plain, reader).digest
    videos = [read_row(row, reader, Pick(9, 8), 48, 64).video for row in (whole, plain)]
    assert torch.equal(*videos)
    with pytest.raises(FormatError, match=r"0.tar/a.webm: cannot be decoded"):
        probe(cut, reader)
    assert is_there(tmp_path / "0.tar/b.txt")
    assert not is_there(tmp_path / "0.tar/c.mp4")
    with pytest.raises(FormatError, match="no such video file"):
        reader.open(tmp_path / "0.tar/c.mp4")
    pytest.importorskip("decord", reason="decord has no wheel for this machine")
    decord = Registry.discover().get("reader", "decord")
    assert decord.config is not None
    with pytest.raises(FormatError, match="a place inside a tar shard"):
        decord.load()(decord.config(), None).open(whole.video)


def test_shards_name_rows_without_caption_or_clip_and_damaged_files(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "0.tar",
        {
            "a.mp4": b"?",
            "b.txt": b"B",
            "c.mp4": b"?",
            "c.mkv": b"?",
            "c.txt": b"C",
            "d.mp4": b"",
            "d.txt": b"\xff",
        },
    )
    (tmp_path / "1.tar").write_bytes(b"no tar file" * 100)
    write_shard(tmp_path / "2.tar", {"a.mp4": bytes(5000), "a.txt": b"A"})
    (tmp_path / "2.tar").write_bytes((tmp_path / "2.tar").read_bytes()[:3000])
    text = str(refused("webdataset", path=tmp_path))
    for part in (
        "0.tar/a: has no .txt",
        "0.tar/b: has 0 media members",
        "0.tar/c: has 2 media members",
        "0.tar/d.txt: byte 0xff is not UTF-8",
        "1.tar: not a plain tar file",
        "2.tar: ",
    ):
        assert part in text, (part, text)


def test_shards_take_captions_from_json_too(tmp_path: Path) -> None:
    files = {"a.mp4": b"?", "a.json": b'{"caption": ["A", "B"]}', "b.mp4": b"?", "b.json": b'{"text": "x"}'}
    write_shard(tmp_path / "0.tar", files)
    error = refused("webdataset", path=tmp_path / "0.tar", caption_suffix=".json")
    assert [row.captions for row in error.rows] == [("A", "B")]
    assert "b.json: has no key 'caption'" in str(error)
