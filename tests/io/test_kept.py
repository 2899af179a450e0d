"""Items of a feature cache: read, kept when small, and named when damaged."""

import json
import pickle

import pytest
import torch

from cvx_core.errors import FormatError
from cvx_io.cache.items import read_item, write_item
from cvx_io.cache.kept import SMALL, Kept


def item(folder, width=5, number=0):
    """Write a latent of `width` values; return its file and tensors."""
    generator = torch.Generator().manual_seed(number)
    tensors = (torch.randn(width, generator=generator), torch.rand(width, generator=generator))
    return write_item(folder, "latent", {"number": number, "width": width}, tensors), tensors


def same(found, tensors):
    return all(map(torch.equal, found, tensors))


def test_a_small_item_is_read_once_and_a_large_one_each_time(tmp_path):
    kept = Kept()
    small, tensors = item(tmp_path)
    large, values = item(tmp_path, SMALL)
    assert same(kept.read(small, "latent"), tensors)
    assert same(kept.read(large, "latent"), values)
    small.unlink()
    large.unlink()
    assert same(kept.read(small, "latent"), tensors)
    with pytest.raises(FormatError, match="cannot be read"):
        kept.read(large, "latent")


def test_no_more_is_kept_than_there_is_room_for(tmp_path):
    kept = Kept(room=2 * 5 * 4)
    (first, tensors), (second, _) = item(tmp_path), item(tmp_path, number=1)
    for path in (first, second):
        kept.read(path, "latent")
        path.unlink()
    assert same(kept.read(first, "latent"), tensors)
    with pytest.raises(FormatError, match="cannot be read"):
        kept.read(second, "latent")


def test_another_process_gets_the_room_and_no_items(tmp_path):
    kept = Kept()
    path, _ = item(tmp_path)
    kept.read(path, "latent")
    assert len(pickle.dumps(kept)) < 200


def damaged(content, what):
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if what == "another dtype":
        header["std"]["dtype"] = "I8"
    if what == "bytes that are no whole values":
        header["std"]["data_offsets"][1] -= 1
    if what == "another shape":
        header["std"]["shape"] = [6]
    if what == "no tensor":
        del header["std"]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@pytest.mark.parametrize(
    "what", ["another dtype", "bytes that are no whole values", "another shape", "no tensor"]
)
def test_a_damaged_header_is_named(tmp_path, what):
    path, _ = item(tmp_path)
    path.write_bytes(damaged(path.read_bytes(), what))
    with pytest.raises(FormatError, match=f"{path.name}: is no latent item of a cache"):
        Kept().read(path, "latent")


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_an_item_cut_short_is_named(tmp_path, length):
    path, _ = item(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FormatError, match=f"{path.name}: is no latent item of a cache"):
        Kept().read(path, "latent")


@pytest.mark.parametrize("spaces", range(8))
def test_tensors_may_begin_anywhere_in_a_file(tmp_path, spaces):
    path, tensors = item(tmp_path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length] + b" " * spaces
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    assert same(read_item(path, "latent"), tensors)
