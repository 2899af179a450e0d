"""Distributed checkpoints as weights: of any framework, and of a run's step; what is beside the weights."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from cvx_core import FormatError
from cvx_core.interfaces import TensorInfo, Tensors
from cvx_core.testing import format
from cvx_io import resume
from cvx_io.rename import Names, Rename
from cvx_plugins.formats import DCPConfig
from cvx_plugins.formats.dcp import dcp_format

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

test_kit = format.suite("dcp")


def made(**fields):
    return dcp_format(DCPConfig(**fields), None)


def weights(**state):
    index = {
        name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in state.items()
    }
    return Tensors(index, state.__getitem__)


def train_step(folder, step=3):
    """Save what the train task saves: a model, its optimizer's tensors and values."""
    model = {"blocks.0.weight": torch.arange(6.0).view(2, 3), "head.bias": torch.ones(3)}
    optimizer = {"state.head.bias.exp_avg": torch.zeros(3), "param_groups.head.bias.lr": 1e-3}
    return resume.save(folder / "checkpoints", step, {"model": model, "optimizer": optimizer}, {}, keep=9)


def test_a_training_state_gives_its_model(tmp_path):
    found = made().open(train_step(tmp_path))
    assert found.index == {
        "blocks.0.weight": TensorInfo((2, 3), "float32"),
        "head.bias": TensorInfo((3,), "float32"),
    }
    assert torch.equal(found.load("blocks.0.weight"), torch.arange(6.0).view(2, 3))
    assert found.origins["head.bias"] == ["model.head.bias"]
    assert found.dropped == {
        "optimizer.state.head.bias.exp_avg": "not under 'model'",
        "optimizer.param_groups.head.bias.lr": "not a tensor",
    }


def test_another_part_can_be_asked_for(tmp_path):
    path = train_step(tmp_path)
    assert list(made(part="optimizer.state").open(path).index) == ["head.bias.exp_avg"]
    assert set(made(part="").open(path).index) == {
        "model.blocks.0.weight",
        "model.head.bias",
        "optimizer.state.head.bias.exp_avg",
    }


def test_a_part_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FormatError, match=r"no tensor under 'ema'\. Names start with: 'model', 'optimizer'"):
        made(part="ema").open(train_step(tmp_path))


def test_weights_alone_are_all_read_even_if_called_model(tmp_path):
    dcp.save({"model": {"w": torch.ones(2)}}, checkpoint_id=tmp_path / "w", no_dist=True)
    assert list(made().open(tmp_path / "w").index) == ["model.w"]


def test_a_names_table_goes_both_ways(tmp_path):
    table = Names((Rename("net.{i}.w", "blocks.{i}.weight"),))
    made().write(tmp_path / "w", weights(**{"blocks.0.weight": torch.ones(2)}), table)
    assert list(made().open(tmp_path / "w").index) == ["net.0.w"]
    found = made().open(tmp_path / "w", table)
    assert list(found.index) == ["blocks.0.weight"]
    assert found.origins["blocks.0.weight"] == ["net.0.w"]


def test_origins_name_what_is_in_the_file_behind_prefix_and_table(tmp_path):
    table = Names((Rename("head.{rest}", "proj.{rest}"), Rename("{rest}", "{rest}")))
    found = made().open(train_step(tmp_path), table)
    assert found.origins["proj.bias"] == ["model.head.bias"]


def test_the_config_is_kept_and_goes_with_the_next_write(tmp_path):
    path = tmp_path / "w"
    made().write(path, weights(a=torch.ones(2)), None, {"_class_name": "Net", "size": 2})
    assert made().open(path).facts == {"config": {"_class_name": "Net", "size": 2}}
    made().write(path, weights(a=torch.ones(2)))
    assert made().open(path).facts == {}
    assert sorted(file.name for file in path.iterdir()) == [".metadata", "__0_0.distcp"]


def test_a_damaged_config_is_named(tmp_path):
    made().write(tmp_path, weights(a=torch.ones(2)), None, {"size": 2})
    (tmp_path / "config.json").write_text(json.dumps({"size": 2})[:-1])
    with pytest.raises(FormatError, match=r"config\.json"):
        made().open(tmp_path)


def test_writing_again_removes_files_of_more_ranks(tmp_path):
    made().write(tmp_path / "w", weights(a=torch.ones(2)))
    (tmp_path / "w" / "__1_0.distcp").write_bytes(b"of an earlier save on two ranks")
    made().write(tmp_path / "w", weights(a=torch.ones(2)))
    assert not (tmp_path / "w" / "__1_0.distcp").exists()


def test_a_write_that_fails_keeps_the_earlier_checkpoint(tmp_path):
    made().write(tmp_path / "w", weights(a=torch.ones(2)))
    liar = replace(weights(a=torch.ones(2)), index={"a": TensorInfo((3,), "float32")})
    with pytest.raises(FormatError, match=r"'a' is .* announced"):
        made().write(tmp_path / "w", liar)
    assert torch.equal(made().open(tmp_path / "w").load("a"), torch.ones(2))
    assert [item.name for item in tmp_path.iterdir()] == ["w"]


def test_the_folder_of_a_run_is_not_taken_for_a_checkpoint(tmp_path):
    first, last = train_step(tmp_path, 3), train_step(tmp_path, 12)
    assert made().accepts(first)
    for path in (tmp_path, tmp_path / "checkpoints"):
        assert not made().accepts(path)
        with pytest.raises(FormatError, match=rf"holds 2 checkpoints. Give .* {last}"):
            made().open(path)


def test_a_folder_without_metadata_or_data_is_not_accepted(tmp_path):
    made().write(tmp_path / "w", weights(a=torch.ones(2)))
    (tmp_path / "w" / "__0_0.distcp").unlink()
    assert not made().accepts(tmp_path / "w")
    assert not made().accepts(tmp_path / "w" / ".metadata")
    with pytest.raises(FormatError, match=r"__0_0\.distcp: is missing"):
        made().open(tmp_path / "w")
