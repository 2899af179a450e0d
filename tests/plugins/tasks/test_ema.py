"""The running average of weights: equal to its formula, resumed bit for bit, exported."""

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from cvx_plugins.tasks.ema import Ema
from cvx_plugins.tasks.ema_config import EmaConfig
from tests.plugins.tasks.test_train import same, state_of


@pytest.fixture
def tiny(tiny):
    """Smaller still: images, one at a time."""
    return {**tiny, "video": {"frames": 1, "height": 32, "width": 32, "fps": 8}, "loader": {"batch": 1}}


def averages(path) -> dict:
    return {name.removeprefix("ema."): t for name, t in state_of(path).items() if name.startswith("ema.")}


def test_it_is_the_average_in_float32_of_weights_in_any_precision():
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    ema = Ema(EmaConfig(decay=0.75, start=1, warmup=False), [("w", weight)])
    expected = 0.0
    for step in range(1, 7):
        with torch.no_grad():
            weight.fill_(step)
        ema.update(step)
        expected = step if step <= 1 else 0.75 * expected + 0.25 * step
        assert ema.average["w"].dtype == torch.float32
        assert ema.average["w"].tolist() == [expected] * 3
    ema.put_in_place()
    assert weight.tolist() == torch.tensor([expected] * 3, dtype=torch.bfloat16).tolist()


def test_the_decay_rises_to_what_was_asked_for():
    ema = Ema(EmaConfig(decay=0.9, start=2), [])
    assert [ema.decay(step) for step in (1, 2, 3, 12)] == [0.0, 0.0, 2 / 11, 11 / 20]
    assert ema.decay(1000) == 0.9


def test_a_resumed_run_has_the_averages_of_an_undisturbed_one_and_exports_them(tiny, launch, tmp_path):
    tiny["task"] |= {"ema": {"decay": 0.9, "start": 1}, "export": {"use": "hf"}, "save_every": 1, "keep": 9}
    whole = launch(tiny, output=str(tmp_path / "whole"))
    launch(tiny, output=str(tmp_path / "parts"), **{"task.stop_at": 2})
    parts = launch(tiny, output=str(tmp_path / "parts"), **{"task.resume": "auto"})
    last = "checkpoints/step-00000004"
    assert same(state_of(whole / last), state_of(parts / last))
    found = averages(whole / last)
    expected = {}
    for step in range(1, 5):
        weights = state_of(whole / f"checkpoints/step-{step:08d}")
        since = step - 1
        decay = min(0.9, (1 + since) / (10 + since)) if since else 0.0
        for name in found:
            weight = weights[f"model.{name}"]
            expected[name] = weight.lerp(expected.get(name, weight), decay)
    [file] = (parts / "model/transformer").glob("*.safetensors")
    exported = load_file(file)
    assert exported.keys() == found.keys()
    for name, average in found.items():
        torch.testing.assert_close(average, expected[name], rtol=0, atol=1e-7)
        assert torch.equal(exported[name], average)
    assert any(not torch.equal(average, weights[f"model.{name}"]) for name, average in found.items())


def test_weights_are_exported_where_that_is_asked_for(tiny, launch):
    tiny["task"] |= {"ema": {"decay": 0.9, "export": False}, "export": {"use": "hf"}}
    out = launch(tiny)
    [file] = (out / "model/transformer").glob("*.safetensors")
    trained = state_of(out / "checkpoints/step-00000004")
    assert all(torch.equal(tensor, trained[f"model.{name}"]) for name, tensor in load_file(file).items())


def test_an_average_may_begin_or_end_with_a_resume_which_is_said(tiny, launch, caplog):
    launch(tiny, **{"task.stop_at": 1})
    tiny["task"]["resume"] = "auto"
    out = launch(tiny, **{"task.stop_at": 2, "task.ema": {"decay": 0.5, "warmup": False}})
    assert "task.ema: step-00000001 holds no average, so it starts from the weights there" in caplog.text
    weights = [state_of(out / f"checkpoints/step-0000000{step}") for step in (1, 2)]
    for name, average in averages(out / "checkpoints/step-00000002").items():
        middle = (weights[0][f"model.{name}"] + weights[1][f"model.{name}"]) / 2
        torch.testing.assert_close(average, middle, rtol=0, atol=1e-7)
    out = launch(tiny)
    assert "task.ema: the average that step-00000002 holds is given up" in caplog.text
    assert not averages(out / "checkpoints/step-00000004")


@pytest.mark.parametrize("fields", [{"decay": 1.0}, {"decay": -0.1}, {"start": -1}, {"begin": 3}])
def test_bad_values_are_refused(fields):
    with pytest.raises(ValidationError):
        EmaConfig(**fields)
