"""torch.save files: read without running them, written so that torch reads them."""

import argparse
import io
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvx_core import FormatError
from cvx_core.interfaces import TensorInfo
from cvx_io.tensors.archive import ALIGNMENT, torch_archive
from cvx_io.tensors.dtypes import SIZES
from cvx_io.tensors.pickles import load_pickle, open_pickle
from cvx_io.tensors.stored import Stored
from cvx_io.tensors.unpickle import Inert

DTYPES = sorted(SIZES)


def values(dtype, shape=(3, 5)):
    count = torch.Size(shape).numel() * SIZES[dtype]
    raw = torch.randint(0, 2 if dtype == "bool" else 200, (count,), dtype=torch.uint8)
    return raw.view(getattr(torch, dtype)).reshape(shape)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def saved(tmp_path, value, **options):
    torch.save(value, tmp_path / "x.pt", **options)
    return tmp_path / "x.pt"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read_as_torch_saves_it(tmp_path, dtype):
    tensor = values(dtype)
    (found,) = load_pickle(saved(tmp_path, {"a": tensor})).values()
    assert found.info == TensorInfo((3, 5), dtype)
    assert found.load().dtype == tensor.dtype
    assert torch.equal(bits(found.load()), bits(tensor))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_every_dtype_that_we_write(tmp_path, dtype, mmap):
    state = {"a": values(dtype), "b": values(dtype, ()), "c": values(dtype, (0, 2)), "d": values(dtype, (7,))}
    index = {name: TensorInfo(tuple(tensor.shape), dtype) for name, tensor in state.items()}
    with torch_archive(tmp_path / "x.pt", index, lambda held: {"module": held, "step": 3}) as archive:
        for name, tensor in state.items():
            archive.write(name, tensor.split(2) if tensor.ndim else [tensor])
    tree = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
    assert tree["step"] == 3
    for name, tensor in state.items():
        assert tree["module"][name].shape == tensor.shape
        assert torch.equal(bits(tree["module"][name]), bits(tensor))


def test_our_files_are_sound_zips_with_aligned_tensors(tmp_path):
    index = {str(i): TensorInfo((i,), "float32") for i in range(1, 6)}
    with torch_archive(tmp_path / "a name.pt", index) as archive:
        for name, info in index.items():
            archive.write(name, [torch.ones(info.shape)])
    with zipfile.ZipFile(tmp_path / "a name.pt") as file:
        assert file.testzip() is None
    for stored in load_pickle(tmp_path / "a name.pt").values():
        assert stored.offset % ALIGNMENT == 0


def test_views_are_read_from_their_storage(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "whole": base,
        "t": base.t(),
        "column": base[:, 2],
        "rows": base[1:3],
        "one": base[3, 5],
        "wide": base[:, None].expand(4, 3, 6),
    }
    found = load_pickle(saved(tmp_path, state))
    assert found["rows"].stride is None
    assert found["t"].stride == (1, 6)
    for name, tensor in state.items():
        assert torch.equal(found[name].load(), tensor), name


def test_containers_and_parameters_are_plain(tmp_path):
    module = torch.nn.Linear(2, 3)
    tree = {
        "list": [1, 2.5, None, "x"],
        "od": OrderedDict(a=(1, 2)),
        "size": torch.Size([2, 3]),
        "sd": module.state_dict(),
        "p": module.weight,
        "set": {1},
    }
    found = load_pickle(saved(tmp_path, tree))
    assert found["list"] == tree["list"]
    assert found["od"] == {"a": (1, 2)}
    assert found["size"] == (2, 3)
    assert found["set"] == {1}
    assert torch.equal(found["p"].load(), module.weight)
    assert found["sd"].keys() == {"weight", "bias"}
    assert torch.equal(found["sd"]["bias"].load(), module.bias)


class Touching:
    """Would make a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_pickle_is_run(tmp_path):
    trap = tmp_path / "trap"
    path = saved(tmp_path, {"bad": Touching(trap), "module": {"a": torch.ones(2), "b": Touching(trap)}})
    tree = load_pickle(path)
    assert not trap.exists()
    assert isinstance(tree["bad"], Inert)
    assert tree["bad"].args == (str(trap), "w")
    assert isinstance(tree["module"]["a"], Stored)


def test_foreign_objects_keep_what_they_were_given(tmp_path):
    args = argparse.Namespace(layers=3, table=np.arange(3), inner=argparse.Namespace(x=1))
    tree = load_pickle(saved(tmp_path, {"args": args}))
    assert tree["args"].layers == 3
    assert tree["args"].inner.x == 1
    assert isinstance(tree["args"].table, Inert)
    assert "argparse.Namespace" in repr(tree["args"])


def test_nothing_that_a_pickle_names_is_imported(tmp_path):
    code = b"\x80\x02cantigravity\nfly\n)R."  # importing it would open a browser
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("x/data.pkl", code)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, pathlib; from cvx_io.tensors.pickles import load_pickle as f; "
            "print(f(pathlib.Path(sys.argv[1]))); "
            "sys.exit(bool({'antigravity', 'torch'} & sys.modules.keys()))",
            str(tmp_path / "x.pt"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "antigravity.fly, not loaded" in done.stdout


@given(st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_a_damaged_file_is_refused_or_read(tmp_path_factory, data):
    """Cut anywhere it is refused; with a byte changed it is read or refused, never a crash."""
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(saved(folder, {"a": torch.ones(4), "b": [torch.zeros(2)]}).read_bytes())
    if data.draw(st.booleans()):
        (folder / "x.pt").write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(FormatError):
            load_pickle(folder / "x.pt")
        return
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (folder / "x.pt").write_bytes(content)
    with suppress(FormatError):
        load_pickle(folder / "x.pt")


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(4)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(tmp_path / "x.pt", "w") as target:
        for name in source.namelist():
            held = source.read(name)
            target.writestr(
                name, held.replace(b"K\x04\x85", b"K\x08\x85") if name.endswith("data.pkl") else held
            )
    with pytest.raises(
        FormatError, match=r"x\.pt: a tensor of shape \[8\] reaches beyond its storage '0' of 16 bytes"
    ):
        load_pickle(tmp_path / "x.pt")


def test_compressed_and_foreign_zips_are_refused(tmp_path):
    path = saved(tmp_path, {"a": torch.ones(400)})
    with (
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(FormatError, match="is compressed"):
        load_pickle(tmp_path / "y.pt")
    with zipfile.ZipFile(tmp_path / "z.pt", "w") as target:
        target.writestr("readme.txt", "hello")
    with pytest.raises(FormatError, match=r"a zip without data\.pkl"):
        load_pickle(tmp_path / "z.pt")


def test_big_endian_files_are_refused(tmp_path):
    path = saved(tmp_path, {"a": torch.ones(4)})
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "y.pt", "w") as target:
        for name in source.namelist():
            target.writestr(name, b"big" if name.endswith("byteorder") else source.read(name))
    with pytest.raises(FormatError, match="big-endian"):
        load_pickle(tmp_path / "y.pt")


def test_files_from_before_zips_are_read_by_torch(tmp_path):
    path = saved(tmp_path, {"a": torch.arange(3)}, _use_new_zipfile_serialization=False)
    assert torch.equal(open_pickle(path).load("a"), torch.arange(3))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(FormatError, match="cannot be read as plain tensors"):
        open_pickle(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(FormatError, match=r"not a torch\.save file"):
        open_pickle(path)
