"""Pickles that are out to do something: nothing in them is run, and what is harmless is read."""

from __future__ import annotations

import enum
import json
import pickle
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.conversion.sources import (
    LZ,
    LZ_FILE,
    MM,
    MM_FIRST,
    SAT,
    SAT_FILE,
    VAE,
    WITHIN,
    convert_main,
    edit,
    says,
)


class Trap:
    """Creates a file when a pickle of it is loaded in the usual way."""

    path = ""

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """An object whose pickle is armed, as is checked first; afterwards it has not gone off."""
    path = tmp_path / "executed"
    monkeypatch.setattr(Trap, "path", str(path))
    pickle.loads(pickle.dumps(Trap())).close()
    path.unlink()
    yield Trap()
    assert not path.exists(), "code in a pickle was run"


@pytest.fixture
def their_classes(monkeypatch):
    """Stand-ins for the classes in LayerZero's files, so that they can be changed and saved again."""
    for module, names in {
        "mindspeed_mm.configs.config": ("MMConfig", "ConfigReader"),
        "mindspeed.core.distributed.layerzero.state.fqn": ("ShardFlattenInfo",),
        "megatron.core.transformer.enums": ("AttnMaskType",),
    }.items():
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        for name in names:
            made = type(name, (), {"__module__": module, "__init__": lambda self, *args: None})
            setattr(sys.modules[module], name, made)


HARMLESS = [
    (SAT, SAT_FILE, lambda tree, trap: tree.update(optimizer=trap)),
    (SAT, SAT_FILE, lambda tree, trap: tree["module"].update({"trap": trap, 7: trap})),
    (VAE, "", lambda tree, trap: tree.update(callbacks=[{"a": trap}])),
    (MM, MM_FIRST, lambda tree, trap: tree.update(args=trap)),
    (MM, MM_FIRST, lambda tree, trap: tree.update(rng_state=[trap])),
    (LZ, "iter_0000200/model_0.pt", lambda tree, trap: tree.update(args=trap)),
]
FATAL = [
    (SAT, SAT_FILE, lambda tree, trap: tree.update(module=trap), "Check the path"),
    (
        SAT,
        SAT_FILE,
        lambda tree, trap: tree["module"].update({f"{WITHIN}mixins.final_layer.linear.bias": trap}),
        "proj_out.bias",
    ),
    (MM, MM_FIRST, lambda tree, trap: tree.update(model=trap), "holds no tensors under `model`"),
    (
        MM,
        MM_FIRST,
        lambda tree, trap: tree["model"].update({"patch_embed.proj.bias": trap}),
        "patch_embed.proj.bias",
    ),
    (LZ, "iter_0000200/model_0.pt", lambda tree, trap: tree.update(model=trap), "LayerZero"),
    (LZ, "iter_0000200/model_0.pt", lambda tree, trap: tree.update(parallel_state=trap), "LayerZero"),
    (LZ, "iter_0000200/model_0.pt", lambda tree, trap: tree.update(shard_state_dict=[trap]), "LayerZero"),
]


@pytest.mark.parametrize(("source", "file", "change"), HARMLESS)
def test_code_beside_the_weights_is_not_run(source, file, change, trap, copied, tmp_path, their_classes):
    path = copied(source)
    edit(path / file if file else path, lambda tree: change(tree, trap))
    assert convert_main([str(path), str(tmp_path / "out"), "--to", "hf", "--verify"]) == 0
    dropped = json.loads((tmp_path / "out/conversion.json").read_text())["dropped"]
    assert {"optimizer", "trap", "callbacks", "args", "rng_state"} & dropped.keys()


@pytest.mark.parametrize(("source", "file", "change", "told"), FATAL)
def test_code_in_place_of_weights_is_not_run(source, file, change, told, trap, copied, fails, their_classes):
    path = copied(source)
    edit(path / file, lambda tree: change(tree, trap))
    says(fails(path), path, told)


def test_code_in_the_metadata_of_a_distributed_checkpoint_is_not_run(trap, copied, fails):
    path = copied("dcp")
    with (path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    metadata.planner_data = trap
    with (path / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    says(fails(path), path / ".metadata", "was not run", "Do not trust this folder")


class ByName(pickle.Pickler):
    """Pickles members of enums as Python 3.11.2 does: getattr(class, name)."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_metadata_that_an_earlier_python_saved_is_read(copied, tmp_path):
    path = copied("dcp")
    with (path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    with (path / ".metadata").open("wb") as file:
        ByName(file).dump(metadata)
    assert b"getattr" in (path / ".metadata").read_bytes()
    assert convert_main([str(path), str(tmp_path / "out"), "--to", "hf", "--verify"]) == 0


class Attribute:
    """Asks for an attribute of a class or a function when it is loaded."""

    def __init__(self, owner):
        self.owner = owner

    def __reduce__(self):
        return getattr, (self.owner, "__call__")


@pytest.mark.parametrize("owner", [shutil.rmtree, Path, dict])
def test_metadata_may_take_nothing_else_by_name(owner, copied, fails):
    path = copied("dcp")
    with (path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    metadata.planner_data = Attribute(owner)
    with (path / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    says(fails(path), path / ".metadata", "was not run", "Do not trust this folder")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("name", "options"), [("x.bin", ["--from", "hf"]), ("x.pt", []), ("x.pt", ["--from", "sat"])]
)
def test_code_in_a_single_file_is_not_run(name, options, zipped, trap, tmp_path, fails):
    path = tmp_path / name
    for tree in ({"a.weight": torch.ones(2), "b": trap}, trap):
        torch.save(tree, path, _use_new_zipfile_serialization=zipped)
        says(fails(path, *options), path)


def test_a_pickle_that_asks_for_all_memory(copied, fails):
    path = copied("dcp")
    data = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(b"\x80\x02]r\xff\xff\xff\x7f0" + data[2:])
    says(fails(path), path / ".metadata", "damaged pickle: place 2147483647 in the memo", "again")


def test_other_names_in_one_shard_of_layerzero(copied, fails, their_classes):
    path = copied(LZ)
    edit(path / LZ_FILE, lambda tree: tree["model"].update(extra=torch.ones(3)))
    says(fails(path), path / LZ_FILE, "holds other names than model_0.pt", "from one save")


def test_a_shard_of_layerzero_that_lacks_elements(copied, fails, their_classes):
    path = copied(LZ)

    def shorten(tree):
        found = next(key for key in tree["model"] if key.endswith("proj_out_linear.weight"))
        tree["model"][found] = tree["model"][found][:-1].clone()

    edit(path / LZ_FILE, shorten)
    says(
        fails(path),
        path / "iter_0000200",
        "'proj_out_linear.weight'",
        "Are files missing, or of another save?",
    )
