"""Weights that do not belong to the recipe: exit code 2, every name, nothing loaded, nothing written."""

import pytest
import yaml
from safetensors.torch import load_file, save_file

from cvx_core import run


@pytest.fixture
def attempt(tiny, launch, tmp_path, capsys):
    """Train a model, change its weights file, then run a recipe that loads it; return the error."""
    tiny["task"] |= {"steps": 1, "export": {"use": "hf"}}
    folder = launch(tiny, output=str(tmp_path / "first")) / "model/transformer"

    def go(change=None, **fields):
        [file] = folder.glob("*.safetensors")
        if change is not None:
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file)
        tiny["predictor"] |= {"weights": {"use": "hf", "path": str(folder)}, **fields}
        recipe = tmp_path / "again.yaml"
        recipe.write_text(yaml.safe_dump({**tiny, "output": str(tmp_path / "second")}))
        assert run.main([str(recipe)]) == 2
        assert not (tmp_path / "second").exists()
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert str(folder) in error
        return error

    return go


def test_a_missing_an_extra_and_a_misshaped_tensor_are_named_at_once(attempt):
    def change(tensors):
        del tensors["proj_out.bias"]
        tensors["stray.weight"] = tensors["norm_final.bias"].clone()
        tensors["norm_final.weight"] = tensors["norm_final.weight"][:3].clone()

    error = attempt(change)
    for part in ("1 missing", "proj_out.bias", "1 not expected", "stray.weight", "norm_final.weight is [3]"):
        assert part in error, error


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"num_layers": 3}, "transformer_blocks.2.attn1.to_q.weight"),
        ({"image_condition": True}, "patch_embed.proj.weight is [32, 4, 2, 2], expected [32, 8, 2, 2]"),
        ({"patch_t": 2}, "patch_embed.proj.weight is [32, 4, 2, 2], expected [32, 32]"),
        ({"positions": "rotary+learned", "sample_height": 4, "sample_width": 6}, "patch_embed.pos_embedding"),
    ],
)
def test_weights_of_another_variant_are_refused_with_the_tensors_that_disagree(attempt, fields, part):
    assert part in attempt(**fields)
