"""Lazy tensor files: what a header tells, what damaged or contradicting files say, shards and pickles."""

import json
import struct
import subprocess
import sys
import weakref

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvx_core import FormatError
from cvx_core.interfaces import TensorInfo, Tensors
from cvx_core.testing.format import as_tensors
from cvx_io.tensors.header import read_header
from cvx_io.tensors.pickles import open_pickle
from cvx_io.tensors.safetensors import open_safetensors
from cvx_io.tensors.shards import has_weights, weights_file
from cvx_io.tensors.write import write_file, write_shards

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4), "c": torch.ones(5).half()}


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


@pytest.fixture
def sharded(tmp_path):
    """A folder with STATE in three shards."""
    write_shards(tmp_path, "model", as_tensors(STATE), limit=1)
    return tmp_path


def test_index_is_read_without_torch(tmp_path):
    write_file(tmp_path / "a.safetensors", as_tensors(STATE))
    code = (
        "import sys, pathlib; from cvx_io.tensors.safetensors import open_safetensors as R; "
        "print(R(pathlib.Path(sys.argv[1])).index['b']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == "TensorInfo(shape=(4,), dtype='int64')\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no header in 0 bytes"),
        (b"abc", "no header in 3 bytes"),
        (raw({}, length=2**60), "header of 1152921504606846976 bytes announced in 10 bytes"),
        (raw({}, length=3), "header of 3 bytes announced"),
        (raw(b"{]"), "broken safetensors header"),
        (raw(b"[1]"), "broken safetensors header"),
        (raw(b"\xff\xfe"), "broken safetensors header"),
        (raw({"a": 3}), "broken safetensors header"),
        (raw({"a": {"dtype": "F32"}}), "broken safetensors header: 'shape'"),
        (raw(b'{"a": 1, "a": 2}'), "a name is given twice"),
        (raw({"a": entry(dtype="F3")}), "unknown dtype 'F3'"),
        (raw({"a": entry(shape=(-1,))}), "are not counts"),
        (raw({"a": entry(shape=(1.5,))}), "are not counts"),
        (raw({"a": entry()}, b"123"), "announces 4 bytes of tensors, the file holds 3. It was cut short"),
        (raw({"a": entry()}, b"12345"), "announces 4 bytes of tensors, the file holds 5. It was extended"),
        (
            raw({"a": entry(shape=(2,))}, b"1234"),
            r"'a' \(float32 \[2\], 8 bytes\) is said to lie at bytes 0 to 4",
        ),
        (raw({"a": entry(offsets=(4, 8))}, b"12345678"), "bytes 4 to 8, where byte 0 is next"),
        (raw({"a": entry(), "b": entry()}, b"1234"), "bytes 0 to 4, where byte 4 is next"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(tmp_path, content, why):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=why) as caught:
        open_safetensors(path)
    assert str(caught.value).startswith(str(path))
    assert "again." in str(caught.value)


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "a.safetensors"
    write_file(path, as_tensors(STATE))
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(FormatError):
        read_header(path)


def test_the_reference_library_reads_our_files(tmp_path):
    write_file(tmp_path / "a.safetensors", as_tensors(STATE))
    assert_equal(safetensors.torch.load_file(tmp_path / "a.safetensors"), STATE)
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_files_of_the_reference_library_are_read(tmp_path):
    state = {**STATE, "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "flag": torch.tensor([True])}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert_equal(dict(open_safetensors(tmp_path).read()), state)


def test_a_dtype_without_a_code_is_refused(tmp_path):
    with pytest.raises(FormatError, match="cannot store dtype 'complex128'"):
        write_file(tmp_path / "a.safetensors", as_tensors({"a": torch.ones(1, dtype=torch.complex128)}))


def test_tensors_come_in_the_order_asked_for(sharded):
    assert [name for name, _ in open_safetensors(sharded).read(["c", "a"])] == ["c", "a"]


def test_shards_are_numbered_and_indexed(sharded):
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in sharded.iterdir()) == [*names, "model.safetensors.index.json"]
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 24 + 32 + 10},
        "weight_map": dict(zip("abc", names, strict=True)),
    }
    assert_equal(dict(open_safetensors(sharded).read()), STATE)


def test_no_shard_exceeds_the_limit_unless_one_tensor_does(tmp_path):
    sizes = [10, 20, 30, 5, 100, 25, 25, 1]
    write_shards(
        tmp_path, "m", as_tensors({str(i): torch.ones(n, dtype=torch.uint8) for i, n in enumerate(sizes)}), 50
    )
    shards = sorted(tmp_path.glob("*.safetensors"))
    held = [[stored.info.shape[0] for stored in read_header(shard).tensors.values()] for shard in shards]
    assert [sorted(group) for group in held] == [[10, 20], [5, 30], [100], [25, 25], [1]]


def test_an_empty_stream_is_one_empty_file(tmp_path):
    write_shards(tmp_path, "m", as_tensors({}), 50)
    assert open_safetensors(tmp_path).index == {}


def test_only_one_tensor_is_held_while_writing(tmp_path):
    alive = []

    def load(name):
        tensor = torch.ones(1)
        alive.append(weakref.ref(tensor))
        assert sum(ref() is not None for ref in alive) == 1
        return tensor

    index = {str(i): TensorInfo((1,), "float32") for i in range(20)}
    write_shards(tmp_path, "m", Tensors(index, load), 10)
    assert len(alive) == 20


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match=r"1 of 3 shards are missing: model-00002-of-00003\.safetensors"):
        open_safetensors(sharded)


@pytest.mark.parametrize(
    ("stored", "what"),
    [
        ({"z": torch.ones(1)}, "listed but not stored, first 'b'"),
        ({**STATE}, "stored but not listed, first 'a'"),
    ],
)
def test_an_index_that_contradicts_a_shard_is_refused(sharded, stored, what):
    write_file(sharded / "model-00002-of-00003.safetensors", as_tensors(stored))
    with pytest.raises(FormatError, match=rf"disagrees with model-00002.*{what}"):
        open_safetensors(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}'])
def test_a_broken_index_is_refused(tmp_path, text):
    (tmp_path / "m.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match="not an index of shards"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "sub/a.safetensors"])
def test_an_index_may_not_point_elsewhere(tmp_path, name):
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FormatError, match="is not a plain file name"):
        open_safetensors(tmp_path)


def test_two_sets_of_weights_are_not_guessed_between(sharded):
    write_file(sharded / "other.safetensors", as_tensors(STATE))
    with pytest.raises(FormatError, match=r"more than one set of weights: .*index\.json, other\.safetensors"):
        weights_file(sharded)
    assert weights_file(sharded / "other.safetensors") == sharded / "other.safetensors"


def test_no_weights_is_an_error(tmp_path):
    assert not has_weights(tmp_path)
    with pytest.raises(FormatError, match="bin file in it"):
        weights_file(tmp_path)
    with pytest.raises(FormatError, match="no such file or folder"):
        weights_file(tmp_path / "missing")


def test_safetensors_are_preferred_to_pickles(tmp_path):
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    assert weights_file(tmp_path).name == "pytorch_model.bin"
    write_file(tmp_path / "model.safetensors", as_tensors(STATE))
    assert weights_file(tmp_path).name == "model.safetensors"


def test_pickles_are_read_whole_and_in_shards(tmp_path):
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    assert_equal(dict(open_pickle(tmp_path / "pytorch_model.bin").read()), STATE)
    assert open_pickle(tmp_path).index["a"] == TensorInfo((2, 3), "float32")

    (tmp_path / "pytorch_model.bin").unlink()
    for name in STATE:
        torch.save({name: STATE[name]}, tmp_path / f"pytorch_model-{name}.bin")
    weight_map = {name: f"pytorch_model-{name}.bin" for name in STATE}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(dict(open_pickle(tmp_path).read(["c", "a"])), {"c": STATE["c"], "a": STATE["a"]})


def test_a_pickle_with_code_is_refused(tmp_path):
    torch.save({"a": subprocess.Popen}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"1 entries are no tensors, first 'a': .*Popen"):
        open_pickle(tmp_path)


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04 and no more"])
def test_a_damaged_pickle_is_refused(tmp_path, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(FormatError, match=r"pytorch_model\.bin: not a torch\.save file, or cut short"):
        open_pickle(tmp_path)


@pytest.mark.parametrize("state", [[torch.ones(1)], {"step": 3}])
def test_a_pickle_of_something_else_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match="Is it a training state, not weights"):
        open_pickle(tmp_path)
