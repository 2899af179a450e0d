"""Building on meta and placing: weights whole or not at all, initial values by name, strategies by stage."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from cvx_core import Component, Config, FormatError, InputPath, PluginError, Registry
from cvx_core.building import build
from cvx_core.placing import initialise, place
from cvx_core.recipe import parse
from cvx_core.run_config import TaskConfig
from cvx_core.spec import resolve
from cvx_core.strategy import Stage, StrategyConfig
from cvx_core.testing.format import as_tensors


class NetConfig(Config):
    flaw: str = ""


class Net(nn.Module):
    aliases: ClassVar = {"old.weight": "layer.weight"}

    def __init__(self, flaw):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 2), nn.LayerNorm(2)
        if flaw == "buffer":
            self.register_buffer("table", torch.zeros(2))
        if flaw == "allocates":
            self.extra = nn.Parameter(torch.zeros(2, device="cpu"))


def build_net(config, _deps):
    return Net(config.flaw)


class JobConfig(TaskConfig):
    needs: ClassVar = ("predictor",)
    trains: ClassVar = "predictor"


class Job:
    def __init__(self, _config, _deps):
        pass

    def prepare(self, parts, _spec):
        return parts

    def run(self, parts, _spec):
        pass


class MarkConfig(StrategyConfig):
    stage: int = 0
    mark: str = ""


class Marking:
    """A strategy that notes when it was applied."""

    applied: ClassVar[list[str]] = []

    def __init__(self, config, _deps):
        self.mark = config.mark

    def apply(self, parts):
        assert all(p.is_meta for p in parts.predictor.parameters()), "strategies come before memory"
        self.applied.append(self.mark)
        return parts


class BoxConfig(Config):
    canonical: ClassVar = True
    path: InputPath | None = None


class Box:
    """A format that keeps tensors in a torch file."""

    def __init__(self, _config, _deps):
        pass

    def open(self, path, names=None):
        return as_tensors(torch.load(path))


@pytest.fixture
def registry():
    here = __name__
    parts = {"net": build_net, "job": Job, "box": Box, **dict.fromkeys("abc", Marking)}
    components = [
        Component("predictor", "net", NetConfig, f"{here}:net"),
        Component("task", "job", JobConfig, f"{here}:job"),
        *(Component("strategy", name, MarkConfig, f"{here}:mark") for name in ("a", "b", "c")),
        Component("format", "box", BoxConfig, f"{here}:box"),
    ]
    Marking.applied.clear()

    class Local(Component):
        def load(self):
            return parts[self.name]

    return Registry([Local(c.kind, c.name, c.config, c.target) for c in components])


def made(registry, text):
    spec = resolve(parse("device: cpu\ntask: {use: job}\n" + text), registry)
    return place(build(spec), spec)


def full():
    return {
        "layer.weight": torch.arange(6.0).view(2, 3),
        "layer.bias": torch.ones(2),
        "norm.weight": torch.full((2,), 3.0),
        "norm.bias": torch.zeros(2),
    }


def loaded(registry, tmp_path, state):
    torch.save(state, tmp_path / "w")
    return made(registry, f"predictor: {{use: net, weights: {{use: box, path: {tmp_path / 'w'}}}}}\n")


def test_weights_are_loaded_into_every_parameter(registry, tmp_path):
    parts = loaded(registry, tmp_path, full())
    for name, parameter in parts.predictor.named_parameters():
        assert torch.equal(parameter, full()[name])
    assert parts.trainable == set(full())


def test_an_alias_stands_for_its_parameter(registry, tmp_path):
    state = full()
    state["old.weight"] = state.pop("layer.weight")
    parts = loaded(registry, tmp_path, state)
    assert torch.equal(parts.predictor.layer.weight, full()["layer.weight"])


def test_every_missing_extra_and_misshaped_name_is_listed(registry, tmp_path):
    state = full()
    del state["norm.bias"]
    state["layer.weight"] = torch.zeros(2, 4)
    state["stray"] = torch.zeros(1)
    with pytest.raises(FormatError) as caught:
        loaded(registry, tmp_path, state)
    for part in (
        "1 missing",
        "norm.bias",
        "1 not expected",
        "stray",
        "layer.weight is [2, 4], expected [2, 3]",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("flaw", "says"), [("buffer", "keeps 1 buffers, first 'table'"), ("allocates", "'extra'")]
)
def test_a_factory_that_allocates_is_the_plugin_authors_error(registry, flaw, says):
    with pytest.raises(PluginError, match=says):
        made(registry, f"predictor: {{use: net, flaw: {flaw}}}\n")


def test_strategies_are_applied_by_stage_not_by_order(registry):
    marks = ", ".join(
        f"{{use: {name}, stage: {int(s)}, mark: {s.name}}}"
        for name, s in zip("abc", (Stage.FEED, Stage.ADAPT, Stage.RUN), strict=True)
    )
    made(registry, f"predictor: {{use: net}}\nparallel: [{marks}]\n")
    assert Marking.applied == ["ADAPT", "RUN", "FEED"]


def test_initial_values_depend_on_seed_and_name_only():
    def values(module, seed):
        initialise(module, seed)
        return {name: p.detach().clone() for name, p in module.named_parameters()}

    first, again = values(Net(""), 3), values(Net(""), 3)
    alone = nn.Module()
    alone.layer = nn.Linear(3, 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(values(alone, 3)["layer.weight"], first["layer.weight"])
    assert not torch.equal(values(Net(""), 4)["layer.weight"], first["layer.weight"])
    assert torch.equal(first["norm.weight"], torch.ones(2))
    assert torch.equal(first["layer.bias"], torch.zeros(2))
    assert 0 < first["layer.weight"].abs().max() <= 3**-0.5
