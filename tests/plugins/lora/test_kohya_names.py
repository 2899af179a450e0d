"""Kohya's names without dots: exact for every linear layer of every preset, refused where they are not."""

import itertools

import pytest
import torch

from cvx_core import FormatError, Registry
from cvx_plugins.lora import kohya_names
from cvx_plugins.lora.kohya_names import from_kohya, to_kohya

PRESETS = ("cogvideox-2b", "cogvideox-5b", "cogvideox-5b-i2v", "cogvideox-1.5-5b", "cogvideox-1.5-5b-i2v")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_linear_layer_keeps_its_name(preset):
    component = Registry.discover().get("predictor", preset)
    with torch.device("meta"):
        model = component.load()(component.config(**component.preset), None)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) > 200
    spelled = [to_kohya(name) for name in linear]
    assert not any("." in name for name in spelled)
    assert [from_kohya(name) for name in spelled] == linear


@pytest.mark.parametrize(
    "spelled",
    [
        "",
        "attn1_to",
        "to_out",
        "transformer_blocks_0_attn1_to_q_",
        "transformer_blocks_x_attn1",
        "_proj",
        "net_1x",
    ],
)
def test_an_unknown_name_is_refused(spelled):
    with pytest.raises(FormatError, match=f"the module '{spelled}' does not consist of"):
        from_kohya(spelled)


@pytest.mark.parametrize("module", ["blocks.0.attn_q", "proj.out", "attn1.to_q.", "linear.1"])
def test_a_name_that_could_not_be_turned_back_is_not_written(module):
    with pytest.raises(FormatError, match="could not be told from"):
        to_kohya(module)


def test_a_name_with_two_readings_is_refused(monkeypatch):
    more = (*kohya_names._PATTERNS, kohya_names._PATTERNS[kohya_names.COMPONENTS.index("proj")])
    monkeypatch.setattr(kohya_names, "COMPONENTS", (*kohya_names.COMPONENTS, "other"))
    monkeypatch.setattr(kohya_names, "_PATTERNS", more)
    with pytest.raises(FormatError, match=r"the module 'ff_proj' could be 'ff\.proj', 'ff\.other'"):
        from_kohya("ff_proj")
    with pytest.raises(FormatError, match="could not be told from"):
        to_kohya("ff.proj")


def test_no_two_components_read_alike():
    names = [component.format(i=7) for component in kohya_names.COMPONENTS]
    for first, second in itertools.product(names, repeat=2):
        assert from_kohya(to_kohya(f"{first}.{second}")) == f"{first}.{second}"
