"""On an accelerator, where there is one: the losses, weights and videos of the CPU."""

import math

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.memory import activations
from cvx_core import CvxError
from cvx_core.building import build
from cvx_core.placing import place
from cvx_core.recipe import parse
from cvx_core.spec import resolve
from cvx_plugins.plan.layout import Layout
from cvx_plugins.plan.passes import Passes, Sample
from tests.plugins.plan.recipes import text

HAS_ONE = torch.accelerator.is_available()
pytestmark = pytest.mark.skipif(not HAS_ONE, reason="no accelerator here")
KIND = torch.accelerator.current_accelerator().type if HAS_ONE else "cpu"

CHANGES = {
    "plain": {},
    "accumulate": {"task.accumulate": 2, "task.ema.decay": 0.9},
    "recompute": {"parallel": [{"use": "recompute"}]},
    "recompute selective": {"parallel": [{"use": "recompute", "mode": "selective"}]},
    "recompute offload": {"parallel": [{"use": "recompute", "offload": True}]},
    "compile": {"parallel": [{"use": "compile"}]},
    "interleave": {"parallel": [{"use": "interleave", "rounds": 2}]},
    "lora": {"adapter": {"use": "lora", "rank": 4}},
    "8-bit": {"optimizer": {"use": "adamw-8bit", "lr": 1e-3, "block": 64}},
    "8-bit offload": {"optimizer": {"use": "adamw-8bit", "lr": 1e-3, "block": 64, "offload": True}},
    "offload": {"optimizer": {"use": "adamw", "lr": 1e-3, "offload": True}},
    "offload state": {"optimizer": {"use": "adamw", "lr": 1e-3, "offload": "state"}},
    "came": {"optimizer": {"use": "came", "lr": 1e-3}},
    "prodigy": {"optimizer": {"use": "prodigy", "d0": 1e-3}},
}
HALF = {
    "rounding": {"optimizer": {"use": "adamw", "lr": 1e-3, "rounding": "stochastic"}},
    "masters": {"optimizer": {"use": "adamw", "lr": 1e-3, "master_weights": "float32"}},
    "all away": {
        "optimizer": {"use": "adamw", "lr": 1e-3, "master_weights": "float32", "offload": True},
        "parallel": [{"use": "recompute", "offload": True}],
        "adapter": {"use": "lora", "rank": 4},
    },
}


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("name", CHANGES)
def test_losses_are_those_of_the_cpu(tiny, launch, log_of, tmp_path, name):
    here = launch(tiny, output=str(tmp_path / "here"), **CHANGES[name])
    there = launch(tiny, output=str(tmp_path / "there"), device=KIND, **CHANGES[name])
    for one, other in zip(log_of(here), log_of(there), strict=True):
        assert one["rows"] == other["rows"]
        for key in ("loss", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-3), (one["step"], key)


@pytest.mark.parametrize("name", HALF)
def test_bfloat16_trains_and_a_resumed_run_goes_on(tiny, launch, log_of, tmp_path, name):
    tiny |= {"device": KIND, "dtype": "bfloat16", "dataset": {"use": "synthetic", "rows": 4}}
    tiny["task"] |= {"steps": 6}
    whole = launch(tiny, output=str(tmp_path / "whole"), **HALF[name])
    launch(tiny, output=str(tmp_path / "parts"), **HALF[name], **{"task.stop_at": 3})
    parts = launch(tiny, output=str(tmp_path / "parts"), **HALF[name], **{"task.resume": "auto"})
    for one, other in zip(log_of(whole), log_of(parts), strict=True):
        assert math.isfinite(one["loss"])
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-2)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_videos_are_those_of_the_cpu(tiny, launch, tmp_path, scheduler):
    tiny["task"] |= {"steps": 1, "export": {"use": "hf"}, "export_whole": True}
    model = launch(tiny, output=str(tmp_path / "trained")) / "model"
    recipe = {
        "model": str(model),
        "video": tiny["video"],
        "dataset": {"use": "prompts", "prompts": ["a red circle", "a blue square"]},
        "text_encoder": {"tokenizer": "bytes"},
        "scheduler": {"use": scheduler},
        "task": {"use": "sample", "steps": 3, "guidance": 2.0, "save_latents": True, "batch": 2},
    }
    folders = [
        launch(recipe, output=str(tmp_path / f"on-{kind}"), device=kind, dtype="float32")
        for kind in ("cpu", KIND)
    ]
    names = sorted(path.name for path in folders[0].glob("*.safetensors"))
    assert len(names) == 2
    for name in names:
        one, other = (load_file(folder / name)["latent"] for folder in folders)
        assert torch.allclose(one, other, atol=1e-3), float((one - other).abs().max())


def test_a_cache_is_filled_and_trained_from(tiny, launch, log_of, tmp_path):
    encode = {key: tiny[key] for key in ("video", "text_encoder", "autoencoder", "dataset", "predictor")}
    encode |= {"device": KIND, "task": {"use": "precompute"}}
    cache = launch(encode, output=str(tmp_path / "cache"))
    online = launch(tiny, output=str(tmp_path / "online"), device=KIND)
    tiny |= {"device": KIND, "dataset": {"use": "feature-cache", "path": str(cache)}}
    cached = launch(tiny, output=str(tmp_path / "cached"))
    for one, other in zip(log_of(online), log_of(cached), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_what_is_not_finite_is_named_here_too(tiny, launch, tmp_path):
    tiny |= {"device": KIND, "optimizer": {"use": "adamw", "lr": 1e30}}
    with pytest.raises(CvxError, match=r"not finite|is nan|is inf"):
        launch(tiny, output=str(tmp_path / "run"), **{"task.steps": 20})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", [None, "full", "selective"])
def test_planned_activations_are_those_of_the_allocator(mode, dtype):
    sizes = {
        "num_heads": 8,
        "head_dim": 64,
        "num_layers": 6,
        "video": {"frames": 33, "height": 384, "width": 512},
        "dtype": dtype,
    }
    parallel = [{"use": "recompute", "mode": mode}] if mode else []
    spec = resolve(parse(text(parallel, 1, **sizes).replace("device: cpu", f"device: {KIND}")))
    passes = Passes(Layout(spec), Sample(spec))
    planned = passes.of(sizes["num_layers"], True, True, 1)
    found = activations(place(build(spec), spec), spec)
    assert planned.kept + passes.tables == pytest.approx(found["kept"], rel=0.05)
    assert planned.peak + passes.tables == pytest.approx(found["peak"], rel=0.05)
