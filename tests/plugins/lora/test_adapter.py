"""The LoRA adapter: PEFT's values and initial weights, names kept, and targets that must exist."""

from __future__ import annotations

import json
from typing import Any

import peft
import pytest
import torch
import yaml
from torch import nn

from cvx_core import RecipeError, resolve
from cvx_core.building import build
from cvx_core.errors import CvxError
from cvx_core.interfaces import Deps
from cvx_core.placing import initialise, place
from cvx_core.random import keyed
from cvx_core.recipe import parse
from cvx_core.run import run
from cvx_plugins.lora.adapter import Lora, matches, targets
from cvx_plugins.lora.adapter_config import LoraConfig, Where
from tests.distributed import matrix

LAYERS = ("to_q", "to_out.0")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.other, self.norm = nn.Linear(6, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.to_out = nn.ModuleList([nn.Linear(8, 5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_out[0](self.norm(self.other(self.to_q(x))))


def adapted(**fields: Any) -> tuple[Net, list[str]]:
    net = Net().double()
    names = Lora(LoraConfig(rank=3, alpha=6, targets=LAYERS, **fields), Deps()).apply(net)
    return net, names


def test_names_stay_and_factors_are_all_that_trains():
    net, names = adapted()
    assert names == [f"{layer}.lora_{factor}.weight" for layer in LAYERS for factor in "AB"]
    assert {name for name, p in net.named_parameters() if p.requires_grad} == set(names)
    assert {name for name, _ in net.named_parameters()} == set(names).union(Net().state_dict())
    assert net.to_q.lora_A.weight.shape == (3, 6)
    assert net.to_q.lora_B.weight.shape == (8, 3)
    assert net.to_q.lora_A.weight.dtype == torch.float64


def test_values_and_gradients_are_those_of_peft():
    net, names = adapted()
    for name in names:
        nn.init.normal_(net.get_parameter(name))
    base = Net().double()
    base.load_state_dict({k: v for k, v in net.state_dict().items() if "lora_" not in k})
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_out.0"])
    )
    peft.set_peft_model_state_dict(
        theirs, {f"base_model.model.{name}": net.get_parameter(name) for name in names}
    )
    x = torch.randn(4, 6, dtype=torch.float64)
    (ours, expected) = net(x), theirs(x)
    assert torch.equal(ours, expected)
    ours.square().sum().backward()
    expected.square().sum().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for name in names:
        their_name = f"base_model.model.{name.replace('.weight', '.default.weight')}"
        assert torch.allclose(net.get_parameter(name).grad, grads[their_name], rtol=1e-12)


def test_initial_values_change_nothing_and_spread_as_those_of_peft():
    net, names = adapted()
    before = {name: p.clone() for name, p in net.named_parameters()}
    start = Lora(LoraConfig(rank=3, targets=LAYERS), Deps()).initial
    initialise(net, 0, dict.fromkeys(names, start), only=names)
    assert not net.to_q.lora_B.weight.any()
    assert torch.equal(net.other.weight, before["other.weight"])
    wide = start("x.lora_A.weight", (400, 300), keyed(0, "x"))
    theirs = torch.empty(400, 300)
    nn.init.kaiming_uniform_(theirs, a=5**0.5)
    bound = 300**-0.5
    assert bound * 0.99 < wide.abs().max() <= bound
    assert abs(float(wide.std() - theirs.std())) < 0.01 * bound


def test_dropout_drops_in_training_only():
    net, names = adapted(dropout=0.5)
    for name in names:
        nn.init.normal_(net.get_parameter(name))
    x = torch.randn(4, 6, dtype=torch.float64)
    assert not torch.equal(net.train()(x), net(x))
    assert torch.equal(net.eval()(x), net(x))


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("blocks.0.attn1.to_q", "to_q", True),
        ("blocks.0.attn1.to_q", "blocks.*.attn1.to_q", True),
        ("blocks.0.attn1.to_q", "attn2.to_q", False),
        ("blocks.0.attn1.to_q", "to_*", True),
        ("blocks.0.attn1.into_q", "to_q", False),
        ("to_q", "attn1.to_q", False),
    ],
)
def test_patterns(name, pattern, expected):
    assert matches(name, pattern) is expected


def test_a_target_that_matches_nothing_names_the_nearest():
    with pytest.raises(CvxError, match=r"'to_qq' matches no linear layer of the Net. Did you mean 'to_q'\?"):
        targets(Net(), Where(("to_q", "to_qq")))
    with pytest.raises(CvxError, match="'norm' matches no linear layer"):
        targets(Net(), Where(("norm",)))


def recipe(adapter: dict[str, Any], **changes: Any) -> str:
    data = yaml.safe_load(matrix.recipe("1.0-t2v", [], "float32", layers=2))
    return yaml.safe_dump(data | {"adapter": {"use": "lora", **adapter}} | changes)


@pytest.mark.parametrize(
    ("adapter", "changes", "message"),
    [
        ({"targets": ["to_z"]}, {}, "recipe:2.*adapter.targets: 'to_z' matches no linear layer"),
        ({"targets": []}, {}, "an empty list"),
        ({"rank": 0}, {}, "adapter.rank"),
        (
            {},
            {"task": {"use": "evaluate"}},
            "task 'evaluate' does not use it. Give what it trained in `adapters`",
        ),
        ({"weights": {"use": "hf", "path": "."}}, {}, "adapter.weights.use: format 'hf' does not hold LoRA"),
        ({"blocks": [0, "1-2"]}, {}, "adapter.blocks: no block 2: the CogVideoX has 2, 0 to 1"),
        ({"blocks": ["1-0"]}, {}, "adapter.blocks: '1-0' is no range of blocks"),
        ({"blocks": ["first"]}, {}, "'first' is no range of blocks"),
        ({"blocks": []}, {}, "an empty list"),
        (
            {"blocks": [1], "targets": ["proj_out"]},
            {},
            "'proj_out' matches no linear layer of the blocks chosen of the CogVideoX",
        ),
        (
            {"dropout": 0.1},
            {"parallel": [{"use": "tp", "size": 2}]},
            "'tp' have a part of the layers",
        ),
        (
            {"dropout": 0.1},
            {"parallel": [{"use": "cp", "ulysses": 2}]},
            "'cp' have a part of the tokens",
        ),
        (
            {"dropout": 0.1},
            {"parallel": [{"use": "pp", "size": 2}]},
            "'pp' have a part of the blocks",
        ),
    ],
)
def test_refused(adapter, changes, message):
    text = recipe(adapter, **changes)
    if "evaluate" in message:
        text = yaml.safe_dump({k: v for k, v in yaml.safe_load(text).items() if k != "optimizer"})
    with pytest.raises(RecipeError, match=message):
        resolve(parse(text))


def test_base_weights_load_without_the_factors(tmp_path):
    spec = resolve(parse(recipe({"rank": 4})))
    parts = place(build(spec), spec)
    assert len(parts.trainable) == 2 * 4 * 2
    assert parts.trainable == parts.added
    state = {k: v.detach() for k, v in parts.predictor.named_parameters() if k not in parts.added}
    from safetensors.torch import save_file

    folder = tmp_path / "base"
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    data = yaml.safe_load(recipe({"rank": 4}, seed=5))
    data["predictor"]["weights"] = {"use": "hf", "path": str(folder)}
    spec = resolve(parse(yaml.safe_dump(data)))
    loaded = place(build(spec), spec)
    for name, value in state.items():
        assert torch.equal(loaded.predictor.get_parameter(name), value), name
    block = loaded.predictor.blocks["1"]
    assert block.attn1.to_q.lora_A.weight.abs().max() > 0
    assert not block.attn1.to_q.lora_B.weight.any()
    state.pop("proj_out.bias")
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CvxError, match=r"proj_out\.bias"):
        place(build(spec), spec)


def test_dropout_is_the_same_after_a_resume_and_when_recomputed(tmp_path):
    data = yaml.safe_load(recipe({"rank": 4, "dropout": 0.5}))
    data["task"] |= {"trackers": [], "steps": 3}
    data["dataset"]["rows"] = 4

    def losses(name: str, *stops: int | None, parallel: tuple[str, ...] = ()) -> list[float]:
        for stop in stops:
            task = data["task"] | {"resume": "auto", "stop_at": stop}
            changes = {"task": task, "parallel": [{"use": use} for use in parallel]}
            run(resolve(parse(yaml.safe_dump(data | changes | {"output": str(tmp_path / name)}))))
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    once = losses("once", None)
    assert once == losses("twice", 1, None)
    assert once == pytest.approx(losses("recomputed", None, parallel=("recompute",)), rel=1e-6)
    data["adapter"]["dropout"] = 0.0
    assert once[1:] != losses("without", None)[1:]


@pytest.mark.parametrize(
    ("blocks", "expected"), [([1], {1}), (["0-1"], {0, 1}), ([0, "2-3"], {0, 2, 3}), (None, {0, 1, 2, 3})]
)
def test_blocks_are_those_chosen(blocks, expected):
    data = yaml.safe_load(recipe({"rank": 2, "targets": ["to_q", "ff.net.*"], "blocks": blocks}))
    data["predictor"]["num_layers"] = 4
    parts = build(resolve(parse(yaml.safe_dump(data))))
    assert {int(name.split(".")[1]) for name in parts.trainable} == expected
    assert len(parts.trainable) == 2 * 2 * len(expected)


def test_gaussian_start_is_that_of_peft():
    lora = Lora(LoraConfig(rank=8, init="gaussian", targets=LAYERS), Deps())
    found = lora.initial("x.lora_A.weight", (8, 20_000), keyed(0, "x"))
    layer = nn.Sequential(nn.Linear(20_000, 2))
    config = peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights="gaussian")
    theirs = peft.get_peft_model(layer, config).base_model.model[0].lora_A["default"].weight
    assert float(found.std()) == pytest.approx(float(theirs.detach().std()), rel=0.02)
    assert not lora.initial("x.lora_B.weight", (5, 8), keyed(0, "x")).any()


def test_dropout_is_allowed_where_ranks_share_out_rows():
    for strategy in ("ddp", "zero3", "recompute"):
        resolve(parse(recipe({"dropout": 0.1}, parallel=[{"use": strategy}])))
    resolve(parse(recipe({"dropout": 0.1}, parallel=[{"use": "tp", "size": 1}])))
