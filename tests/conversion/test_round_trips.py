"""From every layout to every other, for each release at tiny size: nothing is lost, changed or renamed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cvx_core.interfaces import Tensors
from cvx_core.testing.format import as_tensors
from cvx_core.testing.names import parameter_shapes
from tests.conversion.conftest import assert_same, content

TINY = {
    "num_layers": 3,
    "num_heads": 2,
    "head_dim": 16,
    "latent_channels": 2,
    "text_dim": 24,
    "text_length": 5,
    "temb_dim": 16,
    "sample_height": 4,
    "sample_width": 6,
    "sample_frames": 9,
}
RELEASES: Mapping[str, Mapping[str, Any]] = {
    "cogvideox-2b": {},
    "cogvideox-5b": {},
    "cogvideox-5b-i2v": {},
    "cogvideox-1.5-5b": {},
    "cogvideox-1.5-5b-i2v": {"ofs_dim": 16},
}
LAYOUTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "hf": ("hf", {}),
    "sat": ("sat", {}),
    "tp1": ("megatron", {}),
    "tp2": ("megatron", {"tp": 2}),
    "pp-uneven": ("megatron", {"pp": [1, 2]}),
    "tp2pp2": ("megatron", {"tp": 2, "pp": [2, 1]}),
    "dcp": ("dcp", {}),
}


def weights(release: str) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    """Return random bfloat16 weights of a tiny release, one tensor float32, and its config.json."""
    from cvx_core import Registry

    fields = {**TINY, **RELEASES[release]}
    shapes = parameter_shapes("predictor", release, fields)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    state["norm_final.weight"] = state["norm_final.weight"].float()
    component = Registry.discover().get("predictor", release)
    assert component.config is not None
    return state, component.config(**{**component.preset, **fields}).describe()


@pytest.fixture(scope="module", params=RELEASES)
def layouts(request, registry, convert, tmp_path_factory):
    """One release in every layout, each converted from the hf folder."""
    folder = tmp_path_factory.mktemp("layouts")
    state, config = weights(request.param)
    hf = registry.get("format", "hf")
    hf.load()(hf.config(), None).write(folder / "hf", as_tensors(state), None, config)
    for name, (to, settings) in LAYOUTS.items():
        if name != "hf":
            convert(folder / "hf", folder / name, to, settings=settings)
    return folder


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_pair(source, target, layouts, registry, convert, tmp_path):
    to, settings = LAYOUTS[target]
    # Megatron's files do not tell everything; with it stated, nothing is lost.
    model = str(layouts / "hf/config.json") if LAYOUTS[source][0] == "megatron" else None
    report = convert(layouts / source, tmp_path / "out", to, settings=settings, model=model)
    ours = stored(tmp_path / "out", target, registry)
    if source == "sat" and to == "megatron":  # as the original converter, ours hands SAT's rotary tables on
        tables = [name for name in ours if "pos_embed.freqs_" in name]
        assert bool(tables) == ("pos_embed.freqs_cos" in report.consumed)
        ours = {name: tensor for name, tensor in ours.items() if name not in tables}
    assert_same(ours, stored(layouts / target, target, registry))
    assert report.to_json()["missing"] == []
    assert sum(len(names) > 0 for names in report.consumed.values()) == len(report.consumed)


def stored(path: Path, layout: str, registry: Any) -> dict[str, torch.Tensor]:
    """Return everything a layout holds under the names in its files."""
    to = LAYOUTS[layout][0]
    if to == "sat":
        return content(path / "1/mp_rank_00_model_states.pt", "module")
    if to == "megatron":
        files = sorted(path.rglob("model_optim_rng.pt"))
        return {
            f"{file.parent.name}/{name}": value for file in files for name, value in content(file).items()
        }
    component = registry.get("format", to)
    tensors: Tensors = component.load()(component.config(), None).open(path)
    return dict(tensors.read())


def test_a_virtual_pipeline_comes_back(registry, convert, tmp_path):
    state, config = weights("cogvideox-1.5-5b")
    hf = registry.get("format", "hf")
    hf.load()(hf.config(), None).write(tmp_path / "hf", as_tensors(state), None, config)
    for name, pp in (("one", [[1], [2]]), ("even", [[1], [1], [1]])):
        convert(tmp_path / "hf", tmp_path / name, "megatron", settings={"tp": 2, "pp": pp})
        file = tmp_path / name / "release/mp_rank_01/model_optim_rng.pt"
        chunks = [content(file, f"model{number}") for number in range(len(pp))]
        blocks = [
            {key.split(".")[1] for key in chunk if key.startswith("videodit_blocks.")} for chunk in chunks
        ]
        assert [len(found) for found in blocks] == [sizes[0] for sizes in pp]
        assert "patch_embed.proj.weight" in chunks[0]
        assert "proj_out_linear.weight" in chunks[-1]
        convert(tmp_path / name, tmp_path / f"{name}-back", "hf")
        assert_same(stored(tmp_path / f"{name}-back", "hf", registry), state)


def test_stages_of_a_virtual_pipeline_are_read_in_the_order_the_model_runs(registry, convert, tmp_path):
    state, config = weights("cogvideox-1.5-5b")
    state |= {name.replace(".2.", ".3.", 1): -tensor for name, tensor in state.items() if ".2." in name[:22]}
    hf = registry.get("format", "hf")
    config = {**config, "num_layers": 4}
    hf.load()(hf.config(), None).write(tmp_path / "hf", as_tensors(state), None, config)
    convert(tmp_path / "hf", tmp_path / "mm", "megatron", settings={"pp": [[1, 1], [1, 1]]})
    norm = "videodit_blocks.0.norm1.weight"
    for stage in range(2):
        for chunk in range(2):
            held = content(tmp_path / f"mm/release/mp_rank_00_{stage:03}/model_optim_rng.pt", f"model{chunk}")
            expected = state[f"transformer_blocks.{2 * chunk + stage}.norm1.norm.weight"]
            assert torch.equal(held[norm], expected)
    convert(tmp_path / "mm", tmp_path / "back", "hf")
    assert_same(stored(tmp_path / "back", "hf", registry), state)
