"""`model: PATH`: what a folder's parts become, and what is said about parts that cannot be used."""

import json
import shutil
import subprocess
import sys

import pytest

from cvx_core import FormatError, PluginError, Registry
from cvx_core.recipe import parse
from cvx_core.spec import resolve
from cvx_plugins.formats import HFConfig


def test_every_part_becomes_a_section(pipeline_folder, registry):
    found, notes = HFConfig.sections(pipeline_folder, registry)

    def weights(name):
        return {"use": "hf", "path": str(pipeline_folder / name)}

    assert found == {
        "predictor": {"use": "net", "size": 2, "weights": weights("transformer")},
        "autoencoder": {"use": "codec", "size": 2, "weights": weights("vae")},
        "text_encoder": {
            "use": "text",
            "size": 2,
            "weights": weights("text_encoder"),
            "tokenizer": str(pipeline_folder / "tokenizer"),
        },
        "scheduler": {"use": "steps", "size": 2},
    }
    assert "predictor: transformer/config.json (Net) is 'net'" in notes
    assert "scheduler: scheduler/scheduler_config.json (Steps) is 'steps'" in notes


def test_presets_that_share_a_class_are_asked_once(pipeline_folder, registry, asked):
    HFConfig.sections(pipeline_folder, registry)
    assert asked.count("NetConfig") == 1


def test_paths_are_absolute(pipeline_folder, registry, monkeypatch):
    monkeypatch.chdir(pipeline_folder.parent)
    found, _ = HFConfig.sections(type(pipeline_folder)("model"), registry)
    assert found["predictor"]["weights"]["path"] == str(pipeline_folder / "transformer")


def test_anything_else_is_left_to_other_formats(tmp_path, registry):
    (tmp_path / "latest").write_text("1")
    assert HFConfig.sections(tmp_path, registry) is None
    assert HFConfig.sections(tmp_path / "missing", registry) is None
    assert HFConfig.sections(tmp_path / "latest", registry) is None


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder", "scheduler"])
def test_a_missing_part_is_left_out_with_a_note(pipeline_folder, registry, name):
    shutil.rmtree(pipeline_folder / name)
    found, notes = HFConfig.sections(pipeline_folder, registry)
    section = {"transformer": "predictor", "vae": "autoencoder"}.get(name, name)
    assert section not in found
    assert len(found) == 3
    assert f"{section}: left out, {pipeline_folder} has no folder {name!r}" in notes


def test_a_missing_tokenizer_is_left_to_the_recipe_with_a_note(pipeline_folder, registry):
    (pipeline_folder / "tokenizer/spiece.model").unlink()
    found, notes = HFConfig.sections(pipeline_folder, registry)
    assert found["text_encoder"]["tokenizer"] is None
    assert any("no tokenizer in" in note and "the recipe has to name one" in note for note in notes)


@pytest.mark.parametrize("where", ["tokenizer", "text_encoder"])
def test_a_bare_text_encoder_finds_its_tokenizer(pipeline_folder, registry, where):
    (pipeline_folder / "tokenizer/spiece.model").rename(pipeline_folder / where / "tokenizer.json")
    found, _ = HFConfig.sections(pipeline_folder / "text_encoder", registry)
    assert found["text_encoder"]["tokenizer"] == str(pipeline_folder / where)


def test_an_unknown_class_is_refused_with_those_known(pipeline_folder, registry, component_folder):
    component_folder(pipeline_folder / "transformer", "Unheard")
    with pytest.raises(FormatError) as caught:
        HFConfig.sections(pipeline_folder, registry)
    message = str(caught.value)
    assert message.startswith(
        f"{pipeline_folder / 'transformer/config.json'}: no component recognises 'Unheard'"
    )
    assert "predictor 'net', predictor 'net-large'" in message
    assert "steps" not in message


def test_a_scheduler_kind_lists_only_those_able_to_recognise(pipeline_folder, registry, component_folder):
    component_folder(pipeline_folder / "scheduler", "Euler", False, "scheduler_config.json")
    with pytest.raises(FormatError, match=r"scheduler 'steps'\. Install") as caught:
        HFConfig.sections(pipeline_folder, registry)
    assert "cannot-recognise" not in str(caught.value)


def test_a_part_that_recipes_do_not_know_is_refused(pipeline_folder, registry):
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    index["image_encoder"] = ["transformers", "CLIPVisionModel"]
    (pipeline_folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="lists image_encoder; only scheduler"):
        HFConfig.sections(pipeline_folder, registry)


def test_a_part_without_weights_or_config_is_refused(pipeline_folder, registry):
    weights = pipeline_folder / "vae/diffusion_pytorch_model.safetensors"
    weights.unlink()
    with pytest.raises(FormatError, match="vae: has a config but no weights"):
        HFConfig.sections(pipeline_folder, registry)
    (pipeline_folder / "vae/config.json").unlink()
    with pytest.raises(FormatError, match=r"vae: has no config\.json"):
        HFConfig.sections(pipeline_folder, registry)


@pytest.mark.parametrize("text", ["", "[1]", "\x00"])
def test_a_broken_json_is_named(pipeline_folder, registry, text):
    (pipeline_folder / "vae/config.json").write_text(text)
    with pytest.raises(FormatError, match=r"vae/config\.json: "):
        HFConfig.sections(pipeline_folder, registry)


def test_a_recognition_without_a_name_is_the_plugins_fault(pipeline_folder, registry, component_folder):
    component_folder(pipeline_folder / "transformer", "Nameless")
    with pytest.raises(PluginError, match=r"NamelessConfig\.recognise must name the component"):
        HFConfig.sections(pipeline_folder, registry)


@pytest.mark.parametrize(("invert", "card"), [(True, {"image_latent": "divided"}), (False, None)])
def test_image_latents_follow_the_autoencoder(pipeline_folder, registry, component_folder, invert, card):
    component_folder(pipeline_folder / "transformer", "ImageNet")
    component_folder(pipeline_folder / "vae", "Codec", invert_scale_latents=invert)
    found, notes = HFConfig.sections(pipeline_folder, registry)
    assert found["predictor"].get("card") == card
    assert any("image latents are divided" in note for note in notes) == invert


def test_text_to_video_ignores_how_image_latents_are_scaled(pipeline_folder, registry, component_folder):
    component_folder(pipeline_folder / "vae", "Codec", invert_scale_latents=True)
    found, _ = HFConfig.sections(pipeline_folder, registry)
    assert "card" not in found["predictor"]


def test_fields_the_component_refuses_are_reported(pipeline_folder, registry, component_folder):
    component_folder(pipeline_folder / "transformer", "ImageNet", size=100)
    with pytest.raises(
        FormatError, match=r"(?s)transformer: 'imagenet' cannot take its config.*size is at most 99"
    ):
        HFConfig.sections(pipeline_folder, registry)


@pytest.mark.parametrize(("class_name", "section"), [("Net", "predictor"), ("Codec", "autoencoder")])
def test_the_folder_of_one_component_is_one_section(
    tmp_path, registry, component_folder, class_name, section
):
    folder = component_folder(tmp_path / "x", class_name)
    found, notes = HFConfig.sections(folder, registry)
    assert found == {
        section: {"use": class_name.lower(), "size": 2, "weights": {"use": "hf", "path": str(folder)}}
    }
    assert len(notes) == 1


def test_the_folder_of_an_unknown_component_lists_every_kind(tmp_path, registry, component_folder):
    with pytest.raises(FormatError, match=r"scheduler 'steps'.*predictor 'net'"):
        HFConfig.sections(component_folder(tmp_path / "x", "Unheard"), registry)


@pytest.fixture
def reference_folder(shared, tmp_path):
    """A tiny image-to-video pipeline of the 1.5 kind, with the reference weights."""
    sat = shared / "fixtures/sat"
    shutil.copytree(sat / "i2v_1.5/hf/transformer", tmp_path / "transformer")
    shutil.copytree(sat / "vae/hf/vae", tmp_path / "vae")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(
        json.dumps({"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"} | ZERO_SNR)
    )
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "CogVideoXImageToVideoPipeline"}))
    return tmp_path


ZERO_SNR = {"rescale_betas_zero_snr": True, "snr_shift_scale": 1.0, "timestep_spacing": "trailing"}


def test_reference_folders_are_recognised_by_the_built_in_components(reference_folder):
    found, notes = HFConfig.sections(reference_folder, Registry.discover())
    assert set(found) == {"predictor", "autoencoder", "scheduler"}
    assert found["predictor"]["use"] == "cogvideox"
    assert found["predictor"]["card"] == {"image_latent": "scaled"}
    assert found["autoencoder"]["scale_factor"] == 0.7
    assert found["scheduler"]["snr_shift"] == 1.0
    assert any(note.startswith("text_encoder: left out") for note in notes)


def test_sections_are_found_without_torch(reference_folder):
    code = (
        "import sys, pathlib; from cvx_core import Registry; from cvx_plugins.formats import HFConfig; "
        "HFConfig.sections(pathlib.Path(sys.argv[1]), Registry.discover()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(reference_folder)]).returncode == 0


def test_a_recipe_may_name_the_folder_alone(reference_folder):
    text = f"""
cvx: 1
model: {reference_folder}
video: {{frames: 17, height: 64, width: 64}}
text_encoder: {{use: t5, dim: 24}}
dataset: {{use: synthetic, rows: 1}}
task: {{use: evaluate}}
"""
    spec = resolve(parse(text, "recipe.yaml"))
    assert spec.choices["predictor"].weights.config.path == reference_folder / "transformer"
    assert spec.card.image_latent == "scaled"
