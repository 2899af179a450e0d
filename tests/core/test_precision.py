"""Which precision a recipe may ask for: float16 neither trains nor runs what was released in bfloat16."""

import pytest
import yaml

from cvx_core import RecipeError, precision
from cvx_core.recipe import parse
from cvx_core.spec import resolve

PRESET = {"num_layers": 1, "num_heads": 2, "text_dim": 32}
ENCODERS = {
    "text_encoder": {"use": "t5", "num_layers": 1, "dim": 32, "num_heads": 2, "tokenizer": "bytes"},
    "autoencoder": {"use": "cogvideox-vae", "base_channels": 8, "blocks_per_level": 1},
}


def spec_of(use, dtype, task, card=None):
    data = {
        "dtype": dtype,
        "predictor": {"use": use, **PRESET, "card": card or {}},
        "text_encoder": ENCODERS["text_encoder"],
        "autoencoder": ENCODERS["autoencoder"],
        "dataset": {"use": "synthetic"},
        "task": {"use": task},
    }
    if task == "evaluate":
        data["predictor"]["weights"] = {"use": "hf", "path": "."}
        data["autoencoder"] = {**ENCODERS["autoencoder"], "weights": {"use": "hf", "path": "."}}
    return resolve(parse(yaml.safe_dump(data)))


@pytest.mark.parametrize("use", ["cogvideox-2b", "cogvideox-5b", "cogvideox"])
def test_training_in_float16_is_refused(use):
    with pytest.raises(RecipeError, match=r"recipe:\d+: dtype: is float16, in which small.* Train in bfloat"):
        spec_of(use, "float16", "train")


@pytest.mark.parametrize("task", ["evaluate", "precompute"])
def test_a_bfloat16_release_does_not_run_in_float16_unless_its_card_says_so(task):
    said = r"dtype: is float16, but predictor 'cogvideox-5b' was released in bfloat16.* Use bfloat16"
    with pytest.raises(RecipeError, match=said):
        spec_of("cogvideox-5b", "float16", task)
    spec_of("cogvideox-5b", "float16", task, {"dtype": "float16"})
    spec_of("cogvideox-2b", "float16", task)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
@pytest.mark.parametrize("use", ["cogvideox-2b", "cogvideox-5b"])
def test_other_precisions_are_free(use, dtype):
    for task in ("train", "precompute", "evaluate"):
        spec_of(use, dtype, task)


def test_auto_trains_a_float16_release_in_bfloat16_from_features_of_the_same_and_says_so():
    for use, task, expected in (
        ("cogvideox-2b", "train", "bfloat16"),
        ("cogvideox-2b", "precompute", "bfloat16"),
        ("cogvideox-2b", "evaluate", "float16"),
        ("cogvideox-5b", "train", "bfloat16"),
        ("cogvideox", "train", None),
    ):
        spec = spec_of(use, "auto", task)
        assert precision.usual(spec) == expected, (use, task)
        said = any("a float16 release, in bfloat16" in note for note in spec.notes)
        assert said == (use == "cogvideox-2b" and task != "evaluate")
