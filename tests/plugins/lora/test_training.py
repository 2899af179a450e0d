"""A LoRA from training to sampling: exported, read again, loaded at any scale, merged, gone on from."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cvx_core import RecipeError, run
from cvx_core.errors import CvxError, FormatError
from cvx_core.recipe import override, parse
from cvx_core.spec import resolve
from cvx_io.conversion import Request, prepare
from tests.plugins.tasks.conftest import TINY

LORA = {"use": "lora", "rank": 2, "alpha": 3}
SAVED = "model/transformer/diffusion_pytorch_model.safetensors"


def launch(folder, name, data, **overrides):
    """Run recipe data; return its output."""
    recipe = override(parse(yaml.safe_dump(data), base=folder), {"output": str(folder / name), **overrides})
    run.run(resolve(recipe))
    return folder / name


def training(**changes):
    data = yaml.safe_load(TINY)
    data["optimizer"]["lr"] = 5e-2
    data["task"]["steps"] = 2
    return data | changes


def tuning(export, adapter=LORA, **changes):
    data = training(model="base/model", adapter=adapter, **changes)
    del data["predictor"], data["text_encoder"], data["autoencoder"]
    data["text_encoder"] = {"use": "t5", "tokenizer": "bytes"}
    data["task"]["export"] = export and {"use": export}
    return data


def sampling(*adapters, model="base/model"):
    return {
        "device": "cpu",
        "model": model,
        "text_encoder": {"use": "t5", "tokenizer": "bytes"},
        "video": {"frames": 9, "height": 32, "width": 48, "fps": 8},
        "dataset": {"use": "prompts", "prompts": ["a dot"]},
        "task": {"use": "sample", "steps": 2, "save_latents": True},
        "adapters": list(adapters),
    }


def loaded(path, scale=1.0, use="diffusers-lora", **fields):
    return {"use": "merged-lora", "scale": scale, "weights": {"use": use, "path": path}, **fields}


def latent(folder):
    [file] = folder.glob("*.safetensors")
    return load_file(file)["latent"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a trained base, and two LoRAs of it in the layout of diffusers."""
    folder = tmp_path_factory.mktemp("lora")
    base = training()
    base["task"] |= {"export": {"use": "hf"}, "export_whole": True}
    launch(folder, "base", base)
    launch(folder, "one", tuning("diffusers-lora"))
    launch(folder, "two", tuning("diffusers-lora", {**LORA, "rank": 3, "blocks": [1]}, seed=4))
    launch(folder, "plain", sampling())
    launch(folder, "full", sampling(loaded("one/adapter")))
    return folder


def test_the_file_has_the_layout_of_diffusers_and_keeps_alpha(place):
    tensors = load_file(place / "one/adapter/pytorch_lora_weights.safetensors")
    assert len(tensors) == 2 * 4 * 2
    assert all(name.startswith("transformer.transformer_blocks.") for name in tensors)
    second = load_file(place / "two/adapter/pytorch_lora_weights.safetensors")
    assert {name.split(".")[2] for name in second} == {"1"}
    assert not (place / "one/model").exists()


def test_scale_0_is_the_base_bit_for_bit(place):
    launch(place, "zero", sampling(loaded("one/adapter", 0.0)))
    assert torch.equal(latent(place / "zero"), latent(place / "plain"))
    account = json.loads((place / "zero/weights.json").read_text())["adapters"]
    assert len(account[0]["dropped"]) == 2 * 4 * 2 + 8  # factors and alphas


def test_scale_1_is_the_merged_model_of_the_converter(place):
    assert (latent(place / "full") - latent(place / "plain")).abs().max() > 0.01
    base = place / "base/model/transformer"
    prepare(Request(base, place / "merged", "hf", lora=place / "one/adapter")).run()
    spec = sampling() | {"predictor": {"weights": {"use": "hf", "path": "merged"}, "use": "cogvideox"}}
    config = json.loads((base / "config.json").read_text())
    spec["predictor"] |= {"num_layers": config["num_layers"], **training()["predictor"]}
    launch(place, "through-converter", spec)
    assert torch.equal(latent(place / "full"), latent(place / "through-converter"))


def test_what_training_computed_is_what_the_file_gives(place):
    """The trained module, with A and B beside W, predicts as the merged weights do."""
    data = tuning("hf")
    data["task"] |= {"merge": True, "export_whole": True, "resume": "none"}
    launch(place, "merging", data)
    launch(place, "of-merged", sampling(model="merging/model"))
    torch.testing.assert_close(latent(place / "of-merged"), latent(place / "full"), rtol=0, atol=1e-5)


def test_two_adapters_add_up_and_the_record_names_them(place):
    launch(place, "both", sampling(loaded("one/adapter", 0.5), loaded("two/adapter", -1.5)))
    first = prepare(Request(place / "base/model/transformer", place / "m1", "hf", lora=place / "one/adapter",
                            scale=0.5))  # fmt: skip
    first.run()
    prepare(Request(place / "m1", place / "m2", "hf", lora=place / "two/adapter", scale=-1.5)).run()
    merged = load_file(next((place / "m2").glob("*.safetensors")))
    plain = load_file(place / "base" / SAVED)
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    account = json.loads((place / "both/weights.json").read_text())
    assert [item["scale"] for item in account["adapters"]] == [0.5, -1.5]
    assert {f"{name}.weight" for item in account["adapters"] for name in item["modules"]} == changed
    sources = account["predictor"]["consumed"]["transformer_blocks.1.attn1.to_q.weight"]
    assert len(sources) == 5  # the weight, and two factors of each
    [record] = (place / "both").glob("0*.json")
    stated = json.loads(record.read_text())["adapters"]
    assert [item["scale"] for item in stated] == [0.5, -1.5]


@pytest.mark.parametrize("use", ["peft", "comfyui", "kohya", "sat-lora", "megatron-lora"])
def test_other_formats_hold_the_same_adapter(use, place):
    launch(place, use, tuning(use))
    path = f"{use}/adapter.safetensors" if use in ("comfyui", "kohya") else f"{use}/adapter"
    launch(place, f"of-{use}", sampling(loaded(path, use=use)))
    torch.testing.assert_close(latent(place / f"of-{use}"), latent(place / "full"), rtol=0, atol=1e-6)


def test_training_goes_on_from_a_file(place):
    weights = {"use": "diffusers-lora", "path": "one/adapter"}
    still = tuning("diffusers-lora", {**LORA, "weights": weights})
    still["optimizer"]["lr"] = 1e-6
    launch(place, "still", still)
    for ours, theirs in zip(
        *(load_file(place / name / "adapter/pytorch_lora_weights.safetensors").values()
          for name in ("still", "one")), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    account = json.loads((place / "still/weights.json").read_text())["adapter"]
    assert len(account["consumed"]) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 4}, "has rank 2, but adapter.rank is 4. Set it to 2"),
        ({"alpha": 4}, "has alpha 3, but adapter.alpha is 4. Set it to 3"),
        ({"blocks": [0]}, "has 4 modules that are no targets: 'transformer_blocks.1"),
        ({"targets": ["to_q", "proj"]}, r"lacks 2 of 4 targets: .*, and has 6 modules"),
    ],
)
def test_a_file_that_is_not_the_adapter_is_refused(change, message, place):
    weights = {"use": "diffusers-lora", "path": "one/adapter"}
    with pytest.raises(FormatError, match=message):
        launch(place, "refused", tuning("peft", {**LORA, **change, "weights": weights}))
    assert not (place / "refused").exists()


def test_a_lora_of_another_model_is_refused(place):
    file = place / "one/adapter/pytorch_lora_weights.safetensors"
    strange = {
        name.replace("blocks.1", "blocks.7"): value
        for name, value in load_file(file).items()
        if "blocks.1" in name
    }
    save_file(strange, place / "strange.safetensors")
    with pytest.raises(FormatError, match=r"strange.safetensors: states no alpha for 4 modules"):
        launch(place, "refused", sampling(loaded("strange.safetensors")))
    with pytest.raises(FormatError, match=r"strange.safetensors: the model has no weight for 4 of 4"):
        launch(place, "refused", sampling(loaded("strange.safetensors", alpha=3)))
    with pytest.raises(FormatError, match=r"alpha 3 in the file, but 4 was given"):
        launch(place, "refused", sampling(loaded("one/adapter", alpha=4)))


@pytest.mark.parametrize("export", ["diffusers-lora", None])
def test_a_lora_that_changes_nothing_is_an_error_and_the_checkpoint_stays(export, place, tmp_path):
    data = tuning(export)
    data["model"] = str(place / "base/model")
    data["optimizer"]["lr"] = 1e-30
    with pytest.raises(CvxError, match=r"changes nothing: .* in all of 8 modules: 'transformer_blocks.0"):
        launch(tmp_path, "still", data)
    assert list((tmp_path / "still/checkpoints").glob("step-*"))
    assert not (tmp_path / "still/adapter").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tuning("hf"), "format 'hf' holds whole models, and beside an adapter only the adapter is exported"),
        (tuning(None) | {"task": {"use": "train", "merge": True}}, "nothing to do, for there is no `export"),
        (training(task={"use": "train", "merge": True}), "merge: has nothing to do, for there is no adapter"),
        (tuning("peft") | {"adapters": [loaded("one/adapter")]}, "adapters: task 'train' does not use it"),
        (sampling() | {"adapter": LORA}, "does not use it. Give what it trained in `adapters`"),
        (sampling(LORA), r"adapters\[0\]: 'lora' goes into `adapter`. Known here: merged-lora"),
        (tuning("peft", {"use": "merged-lora"}), "'merged-lora' goes into `adapters`. Known here: lora"),
        (sampling({"use": "merged-lora"}), r"adapters\[0\]: has no weights"),
        (sampling(loaded("one/adapter", use="hf")), "hold LoRA weights. Did you mean 'diffusers-lora'"),
        (sampling(loaded("nowhere")), "no such file or folder"),
        (sampling() | {"adapters": {"use": "merged-lora"}}, "expected a list"),
    ],
)  # fmt: skip
def test_recipes_refused(data, message, place):
    with pytest.raises(RecipeError, match=message):
        launch(place, "refused", data)
    assert not (place / "refused").exists()


def test_adapters_are_part_of_the_resolved_recipe(place):
    spec = resolve(parse(yaml.safe_dump(sampling(loaded("one/adapter", 0.5))), base=place))
    again = resolve(parse(spec.to_yaml(), base=place))
    assert again.digest == spec.digest
    assert again.adapters[0].config.scale == 0.5
    other = resolve(parse(yaml.safe_dump(sampling(loaded("one/adapter", 0.6))), base=place))
    assert other.digest != spec.digest
