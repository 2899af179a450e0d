"""Runs with each optimizer: they resume bit for bit, and settings that do not go together are refused."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from cvx_core import RecipeError, Registry
from cvx_core.interfaces import ParamGroup
from cvx_core.recipe import override, parse
from cvx_core.spec import resolve
from cvx_plugins.tasks.guards import Changed

LAST = "checkpoints/step-00000004"
HALF = {"dtype": "bfloat16"}
RUNS = {
    "8-bit": (
        {},
        {"use": "adamw-8bit", "lr": 1e-3, "block": 64, "groups": [{"match": "*norm*", "lr": 1e-4}]},
    ),
    "came": ({}, {"use": "came", "lr": 1e-3}),
    "prodigy": ({}, {"use": "prodigy", "d0": 1e-3, "growth_rate": 1.5}),
    "offload": ({}, {"use": "adamw", "lr": 1e-3, "offload": True}),
    "8-bit rounded": (HALF, {"use": "adamw-8bit", "lr": 1e-3, "rounding": "stochastic"}),
    "masters": (HALF, {"use": "adamw", "lr": 1e-3, "master_weights": "float32", "offload": True}),
    "prodigy masters": (HALF, {"use": "prodigy", "d0": 1e-3, "master_weights": "float32"}),
}


def tensors_of(path):
    """Return every tensor of a checkpoint by name."""
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.zeros(info.size, dtype=info.properties.dtype)
        for name, info in metadata.items()
        if hasattr(info, "size")
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


@pytest.mark.parametrize("name", RUNS)
def test_two_steps_and_two_more_equal_four_bit_for_bit(tiny, launch, tmp_path, name):
    changes, optimizer = RUNS[name]
    tiny |= {**changes, "optimizer": optimizer}
    tiny["task"] |= {"schedule": "cosine", "warmup": 2}
    whole = launch(tiny, output=str(tmp_path / "whole"))
    launch(tiny, output=str(tmp_path / "parts"), **{"task.stop_at": 2})
    parts = launch(tiny, output=str(tmp_path / "parts"), **{"task.resume": "auto"})
    assert (whole / "log.jsonl").read_bytes() == (parts / "log.jsonl").read_bytes()
    one, other = tensors_of(whole / LAST), tensors_of(parts / LAST)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype
        assert torch.equal(value, other[key]), key
    kept = {key.rsplit(".", 1)[-1]: value.dtype for key, value in one.items() if ".state." in key}
    if optimizer["use"] == "adamw-8bit":
        assert kept["exp_avg_codes"] == torch.uint8
    if "master_weights" in optimizer:
        assert kept["master"] == torch.float32


def test_offloading_changes_nothing_and_can_be_switched_in_a_resumed_run(tiny, launch, tmp_path):
    tiny["task"] |= {"accumulate": 2, "grad_clip": 0.1}
    plain = launch(tiny, output=str(tmp_path / "plain"))
    launch(tiny, output=str(tmp_path / "off"), **{"task.stop_at": 2})
    off = launch(tiny, output=str(tmp_path / "off"), **{"task.resume": "auto", "optimizer.offload": True})
    assert (plain / "log.jsonl").read_bytes() == (off / "log.jsonl").read_bytes()
    one, other = tensors_of(plain / LAST), tensors_of(off / LAST)
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_updates_that_show_in_masters_alone_are_a_change():
    for fields, expected in (({"master_weights": "float32"}, True), ({"offload": True}, False)):
        param = torch.nn.Parameter(torch.ones(300, 2, dtype=torch.bfloat16))
        component = Registry.discover().get("optimizer", "adamw")
        make = component.load()(component.config(lr=1e-6, weight_decay=0.0, **fields), None)
        optimizer = make.build([ParamGroup([("weight", param)], {})])
        for _ in range(3):
            param.grad = torch.ones_like(param)
            changed = Changed([param], optimizer)
            optimizer.step()
            assert bool(changed) is expected
            assert bool((param == 1).all())


REFUSED = {
    "came under zero2": (
        {"optimizer": {"use": "came"}, "parallel": [{"use": "zero2"}]},
        "'came' takes means over the rows and columns of whole parameters, and 'zero2' shares parameters out",
    ),
    "prodigy under zero1": (
        {"optimizer": {"use": "prodigy"}, "parallel": [{"use": "zero1"}]},
        "'prodigy' finds one step size from sums over all parameters, and 'zero1' shares parameters out",
    ),
    "prodigy under pp": (
        {"optimizer": {"use": "prodigy"}, "parallel": [{"use": "pp"}]},
        "'pp' shares parameters out. Use adamw or adamw-8bit, or only ddp and cp.",
    ),
    "prodigy under zero3 and pp": (
        {"optimizer": {"use": "prodigy"}, "parallel": [{"use": "zero3"}, {"use": "pp"}]},
        "'zero3' and 'pp' share parameters out. Use adamw or adamw-8bit, or only ddp and cp.\n1 problem",
    ),
    "prodigy with two rates": (
        {"optimizer": {"use": "prodigy", "groups": [{"match": "*norm*", "lr": 0.5}]}},
        r"groups\.0\.lr: prodigy finds one step size",
    ),
    "prodigy at the rate of AdamW": (
        {"optimizer": {"use": "prodigy", "lr": 1e-4}},
        "optimizer.lr: got 0.0001",
    ),
    "gradients away under ddp": (
        {"optimizer": {"use": "came", "offload": True}, "parallel": [{"use": "ddp"}]},
        "takes gradients away before 'ddp' can exchange them. Use offload: state",
    ),
    "offload under tp": (
        {"optimizer": {"use": "adamw", "offload": True}, "parallel": [{"use": "tp"}]},
        "optimizer.offload: needs state that is kept whole, and 'tp' shares it out",
    ),
    "masters of float32": (
        {"dtype": "float32", "optimizer": {"use": "came", "master_weights": "float32"}},
        "optimizer.master_weights: does nothing, since weights are float32",
    ),
    "rounding to float16": (
        {"dtype": "float16", "optimizer": {"use": "adamw", "rounding": "stochastic"}},
        "optimizer.rounding: is for bfloat16, and dtype is float16. Use master_weights",
    ),
    "both remedies": (
        {
            "dtype": "bfloat16",
            "optimizer": {"use": "adamw", "rounding": "stochastic", "master_weights": "float32"},
        },
        "rounding: stochastic does nothing beside master_weights",
    ),
    "an unknown field": ({"optimizer": {"use": "came", "beta": 0.9}}, "Did you mean 'betas'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused(tiny, tmp_path, name):
    changes, message = REFUSED[name]
    with pytest.raises(RecipeError, match=message):
        resolve(parse(yaml.safe_dump(tiny | changes), base=tmp_path))


@pytest.mark.parametrize("use", ["adamw", "adamw-8bit", "came", "prodigy"])
def test_every_field_is_stated_and_resolves_again(tiny, tmp_path, use):
    spec = resolve(override(parse(yaml.safe_dump(tiny), base=tmp_path), {"optimizer": {"use": use}}))
    assert spec.config("optimizer").lr == (1.0 if use == "prodigy" else 1e-4)
    again = resolve(parse(spec.to_yaml(), base=tmp_path))
    assert json.dumps(again.resolved) == json.dumps(spec.resolved)
