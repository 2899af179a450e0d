"""Distributed checkpoints: what torch saves comes back whole, damage is named, nothing in a file is run."""

import os
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import multiprocessing, nn
from torch.distributed.checkpoint import metadata as meta
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from cvx_core import FormatError
from cvx_core.interfaces import TensorInfo, Tensors
from cvx_io.pieces import describe
from cvx_io.tensors.dcp import open_dcp, write_dcp
from cvx_io.tensors.dtypes import SIZES

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WHOLE = ((0, 0), (4, 6))


def as_tensors(state):
    return Tensors({name: describe(tensor) for name, tensor in state.items()}, state.__getitem__)


def save(folder, state):
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def grid():
    return torch.arange(24.0).view(4, 6)


def save_boxes(folder, boxes, contents=None, size=(4, 6), **info):
    """Write a checkpoint of one tensor `w` in boxes (offsets, sizes), each in a file of its own.

    contents: what a chunk's archive holds instead, by number; info: what else is said of every chunk.
    """
    folder.mkdir()
    chunks, places = [], {}
    for number, (offsets, sizes) in enumerate(boxes):
        box = grid()[tuple(slice(at, at + length) for at, length in zip(offsets, sizes, strict=True))]
        file = folder / f"__{number}_0.distcp"
        torch.save((contents or {}).get(number, box.clone()), file)
        chunks.append(meta.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        place = {"relative_path": file.name, "offset": 0, "length": file.stat().st_size, **info}
        places[meta.MetadataIndex("w", offsets)] = _StorageInfo(**place)
    entry = meta.TensorStorageMetadata(meta.TensorProperties(torch.float32), torch.Size(size), chunks)
    save_metadata(folder, meta.Metadata({"w": entry}, {"w": ("w",)}, places))
    return folder


def save_metadata(folder, metadata):
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


class Makes:
    """Creates a folder when it is unpickled by the usual means."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def whole_tensors():
    """Return what the ranks share out: rows and columns that do not divide by 2, and a single row."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"rows": (5, 3), "columns": (3, 7), "one_row": (1, 4), "copied": (2, 2), "cube": (2, 3, 5)}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))


def save_as_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    placements = {"columns": Shard(1), "copied": Replicate(), "cube": Shard(2)}
    state = {
        name: distribute_tensor(tensor, mesh, [placements.get(name, Shard(0))])
        for name, tensor in whole_tensors().items()
    }
    sharded = fully_shard(model(), mesh=mesh)
    dcp.save({**state, "net": sharded.state_dict(), "step": 7}, checkpoint_id=folder / "saved")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    """A checkpoint that two ranks saved together."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.start_processes(save_as_rank, (folder,), nprocs=2, start_method="fork")
    return folder / "saved"


def test_tensors_sharded_over_ranks_come_back_whole(of_two_ranks):
    found = open_dcp(of_two_ranks)
    for name, tensor in whole_tensors().items():
        assert found.index[name] == describe(tensor)
        assert torch.equal(found.load(name), tensor), name


def test_a_model_sharded_by_fsdp_comes_back_whole(of_two_ranks):
    found = open_dcp(of_two_ranks, "net")
    expected = model().state_dict()
    assert found.index.keys() == expected.keys()
    assert all(torch.equal(found.load(name), tensor) for name, tensor in expected.items())


def test_each_rank_saved_a_part_and_what_is_no_tensor_is_dropped(of_two_ranks):
    assert len(list(of_two_ranks.glob("*.distcp"))) == 2
    assert open_dcp(of_two_ranks).dropped == {"step": "not a tensor"}


def test_one_rank_saved_by_torch_is_read_bit_for_bit(tmp_path):
    state = {"a": grid().t(), "b": torch.tensor(3), "c": torch.zeros(0, 2), "d": torch.rand(9)[::2]}
    found = open_dcp(save(tmp_path, state))
    assert all(torch.equal(found.load(name), tensor) for name, tensor in state.items())


def example(dtype):
    tensor = (torch.rand(3, 5) * 100).to(getattr(torch, dtype))
    return {"whole": tensor, "scalar": tensor[0, 0].clone(), "empty": tensor[:0]}


@pytest.mark.parametrize("dtype", SIZES)
def test_torch_and_we_load_what_we_wrote_bit_for_bit(tmp_path, dtype):
    state = example(dtype)
    write_dcp(tmp_path, as_tensors(state))
    by_torch = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(by_torch, checkpoint_id=tmp_path, no_dist=True)
    by_us = dict(open_dcp(tmp_path).read())
    for name, tensor in state.items():
        for got in (by_torch[name], by_us[name]):
            assert describe(got) == describe(tensor)
            assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_torchs_own_converter_takes_what_we_wrote(tmp_path):
    state = {"a.weight": grid(), "a.bias": torch.ones(2)}
    write_dcp(tmp_path / "dcp", as_tensors(state))
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "all.pt")
    converted = torch.load(tmp_path / "all.pt", weights_only=True)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in state.items())


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path):
    large = torch.rand(100_000)
    write_dcp(tmp_path, as_tensors({"a": large[10:20], "b": large.view(10, 10_000).t()[:3]}))
    assert (tmp_path / "__0_0.distcp").stat().st_size < 10_000
    assert torch.equal(open_dcp(tmp_path).load("b"), large.view(10, 10_000).t()[:3])


def test_what_we_wrote_is_mapped_not_copied(tmp_path):
    write_dcp(tmp_path, as_tensors({"a": torch.ones(3), "b": grid()}))
    loaded = open_dcp(tmp_path).load("b")
    with (tmp_path / "__0_0.distcp").open("r+b") as file:
        at = file.read().index(grid().numpy().tobytes())
        file.seek(at)
        file.write(torch.tensor(-1.0).numpy().tobytes())
    assert loaded[0, 0] == -1.0


def test_a_tensor_other_than_announced_is_not_written(tmp_path):
    wrong = Tensors({"a": TensorInfo((2,), "float32")}, lambda name: torch.ones(3))
    with pytest.raises(FormatError, match=r"'a' is .* announced"):
        write_dcp(tmp_path, wrong)
    assert not (tmp_path / ".metadata").exists()


def test_boxes_may_be_cut_along_any_dims_in_any_order(tmp_path):
    boxes = [((2, 4), (2, 2)), ((0, 0), (3, 4)), ((0, 4), (2, 2)), ((3, 0), (1, 4)), ((4, 6), (0, 0))]
    assert torch.equal(open_dcp(save_boxes(tmp_path / "w", boxes)).load("w"), grid())


@pytest.mark.parametrize(
    ("boxes", "what"),
    [
        ([((0, 0), (2, 6))], "hold 12 of its 24 elements"),
        ([((0, 0), (2, 6)), ((1, 0), (2, 6))], "overlap"),
        ([((0, 0), (4, 6)), ((1, 1), (1, 1))], "overlap"),
        ([((0, 0), (3, 4)), ((2, 2), (2, 4)), ((0, 4), (2, 2))], "overlap"),
    ],
)
def test_chunks_that_overlap_or_leave_gaps_are_refused(tmp_path, boxes, what):
    with pytest.raises(FormatError, match=f"chunks of 'w' {what}"):
        open_dcp(save_boxes(tmp_path / "w", boxes))


def test_a_chunk_outside_its_tensor_is_refused(tmp_path):
    with pytest.raises(FormatError, match=r"'w' at .* lies outside shape"):
        open_dcp(save_boxes(tmp_path / "w", [WHOLE], size=(3, 8)))


def test_a_chunk_of_another_tensor_is_named_when_it_is_loaded(tmp_path):
    found = open_dcp(save_boxes(tmp_path / "w", [WHOLE], {0: torch.ones(6, 4)}))
    with pytest.raises(FormatError, match=r"a chunk of 'w' at byte 0 is .*\(6, 4\).* says .*\(4, 6\)"):
        found.load("w")


def test_opening_reads_no_chunk_and_damage_in_one_is_found_on_loading(tmp_path):
    path = save(tmp_path, {"a": torch.ones(3), "b": torch.ones(3)})
    data = path / "__0_0.distcp"
    data.write_bytes(bytes(data.stat().st_size))
    found = open_dcp(path)
    assert found.index.keys() == {"a", "b"}
    with pytest.raises(FormatError, match=r"__0_0\.distcp: not a torch.save file"):
        found.load("a")


def test_files_cut_short_or_missing_are_named_on_opening(tmp_path):
    data = save(tmp_path, {"a": torch.ones(3)}) / "__0_0.distcp"
    size = data.stat().st_size
    os.truncate(data, size - 1)
    with pytest.raises(
        FormatError, match=rf"__0_0\.distcp: was cut short: {size - 1} bytes instead of {size}"
    ):
        open_dcp(tmp_path)
    data.unlink()
    with pytest.raises(FormatError, match=r"__0_0\.distcp: is missing"):
        open_dcp(tmp_path)


def test_a_folder_without_metadata_is_refused(tmp_path):
    (save(tmp_path, {"a": torch.ones(3)}) / ".metadata").unlink()
    with pytest.raises(FormatError, match=r"no file \.metadata"):
        open_dcp(tmp_path)


@pytest.mark.parametrize("cut", [1, 100])
def test_metadata_cut_short_is_refused(tmp_path, cut):
    file = save(tmp_path, {"a": torch.ones(3)}) / ".metadata"
    os.truncate(file, file.stat().st_size - cut)
    with pytest.raises(FormatError, match=r"\.metadata: damaged pickle"):
        open_dcp(tmp_path)


@pytest.mark.parametrize(
    "content", [{"a": 1}, [], meta.Metadata({"a": 3}, None, {}), meta.Metadata({}, None)]
)
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    save_metadata(tmp_path, content)
    with pytest.raises(FormatError, match="not the metadata of a distributed checkpoint"):
        open_dcp(tmp_path)


def test_an_unknown_name_is_refused_and_the_nearest_told(tmp_path):
    with pytest.raises(FormatError, match=r"no tensor 'a.weigth'\..*'a.weight'"):
        list(open_dcp(save(tmp_path, {"a.weight": torch.ones(3)})).read(["a.weigth"]))


def test_an_unreadable_dtype_is_named_unless_it_is_left_out(tmp_path):
    state = {"model": {"a": torch.ones(3)}, "other": {"b": torch.ones(3, dtype=torch.complex128)}}
    save(tmp_path, state)
    assert list(open_dcp(tmp_path, "model").index) == ["a"]
    with pytest.raises(FormatError, match=r"'other\.b' is complex128"):
        open_dcp(tmp_path)


def test_compressed_chunks_are_refused(tmp_path):
    path = save_boxes(tmp_path / "w", [WHOLE], transform_descriptors=["stream.zstd"])
    with pytest.raises(FormatError, match=r"'w' went through 'stream\.zstd'"):
        open_dcp(path)


@pytest.mark.parametrize("name", ["../__0_0.distcp", "/etc/passwd"])
def test_a_chunk_in_another_folder_is_refused(tmp_path, name):
    with pytest.raises(FormatError, match="not a plain file name"):
        open_dcp(save_boxes(tmp_path / "w", [WHOLE], relative_path=name))


@pytest.mark.parametrize("where", ["all", "entry", "name", "place", "planner"])
def test_metadata_that_would_run_something_is_refused_and_does_not(tmp_path, where):
    path, made = save_boxes(tmp_path / "w", [WHOLE]), tmp_path / "made"
    content = pickle.loads((path / ".metadata").read_bytes())
    if where == "all":
        content = Makes(made)
    elif where == "planner":
        content.planner_data = {"w": (Makes(made),)}
    elif where == "place":
        content.storage_data = dict.fromkeys(content.storage_data, Makes(made))
    else:
        content.state_dict_metadata = {"w": Makes(made)} if where == "entry" else {(Makes(made),): None}
    save_metadata(path, content)
    with pytest.raises(FormatError, match=r"'\w+\.mkdir', which is no part of a torch checkpoint"):
        open_dcp(path)
    assert not made.exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert made.exists()  # so it would have


def test_a_chunk_that_would_run_something_is_refused_and_does_not(tmp_path):
    made = tmp_path / "made"
    path = save_boxes(tmp_path / "w", [WHOLE], {0: Makes(made)})
    with pytest.raises(FormatError, match=r"a chunk of 'w' at byte 0 is <\w+\.mkdir, not loaded>"):
        open_dcp(path).load("w")
    assert not made.exists()
    torch.load(path / "__0_0.distcp", weights_only=False)
    assert made.exists()
