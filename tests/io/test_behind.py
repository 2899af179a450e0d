"""Files written in a thread of their own: any writes give the bytes they should, and errors are heard of."""

import random
import resource
from pathlib import Path

import pytest

from cvx_io.tensors import behind
from cvx_io.tensors.behind import write_behind


@pytest.mark.parametrize("seed", range(8))
def test_writes_of_any_length_and_changes_anywhere(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(behind, "BLOCK_SIZE", 64)
    draw = random.Random(seed)
    expected = bytearray()
    with write_behind(tmp_path / "x") as file:
        for _ in range(300):
            data = draw.randbytes(draw.choice([0, 1, 5, 30, 64, 200]))
            kind = draw.choice(["append", "in place", "change"])
            if kind == "in place":
                room = file.room()
                data = data[: len(room)]
                room[: len(data)] = data
                assert file.write(room[: len(data)]) == len(data)
                expected += data
            elif kind == "append":
                assert file.write(data) == len(data)
                expected += data
            elif len(data) <= len(expected):
                begin = draw.randint(0, len(expected) - len(data))
                assert file.seek(begin) == begin
                file.write(data)
                expected[begin : begin + len(data)] = data
                file.seek(len(expected))
            if draw.random() < 0.05:
                file.flush()
            assert file.tell() == len(expected)
    assert (tmp_path / "x").read_bytes() == expected


def test_what_was_handed_over_may_be_changed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(behind, "BLOCK_SIZE", 8)
    data = bytearray(range(100))
    with write_behind(tmp_path / "x") as file:
        file.write(data)
        data[:] = bytes(100)
    assert (tmp_path / "x").read_bytes() == bytes(range(100))


def test_an_error_of_the_system_is_raised(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"), write_behind(tmp_path / "x") as file:
            file.write(bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_error_of_the_caller_ends_it_with_nothing_left_open(tmp_path):
    def fail():
        with write_behind(tmp_path / "x") as file:
            file.write(b"a")
            raise ValueError("theirs")

    handles = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ValueError, match="theirs"):
        fail()
    assert len(list(Path("/proc/self/fd").iterdir())) == handles
