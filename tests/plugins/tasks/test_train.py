"""Training: it learns, it resumes bit for bit, it exports what it learned, and it stops where it should."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file

from cvx_core import CvxError, FormatError, RecipeError
from cvx_core.building import build
from cvx_core.placing import place
from cvx_core.recipe import parse
from cvx_core.spec import resolve
from cvx_plugins.tasks import loop


def state_of(path):
    """Return every tensor of a checkpoint by name."""
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.zeros(info.size, dtype=info.properties.dtype) if hasattr(info, "size") else None
        for name, info in metadata.items()
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2}, {"memory": True}, {"schedule": "cosine", "warmup": 2}],
    ids=lambda o: "-".join(o) or "plain",
)
def test_six_steps_and_six_more_equal_twelve_bit_for_bit(tiny, launch, log_of, options, tmp_path):
    tiny["task"] |= {"steps": 12, **options}
    whole = launch(tiny, output=str(tmp_path / "whole"))
    launch(tiny, output=str(tmp_path / "parts"), **{"task.stop_at": 6})
    parts = launch(tiny, output=str(tmp_path / "parts"), **{"task.resume": "auto"})
    assert (whole / "log.jsonl").read_bytes() == (parts / "log.jsonl").read_bytes()
    assert len(log_of(whole)) == 12
    last = "checkpoints/step-00000012"
    assert same(state_of(whole / last), state_of(parts / last))
    assert any("exp_avg_sq" in name for name in state_of(whole / last))


def test_resume_from_a_path_continues_another_run(tiny, launch, log_of, tmp_path):
    tiny["task"] |= {"steps": 4}
    first = launch(tiny, output=str(tmp_path / "a"), **{"task.stop_at": 2})
    second = launch(tiny, output=str(tmp_path / "b"), **{"task.resume": str(first)})
    assert [line["step"] for line in log_of(second)] == [3, 4]


def test_a_second_run_into_the_same_folder_is_refused(tiny, launch):
    launch(tiny)
    with pytest.raises(FormatError, match=r"task\.resume=auto"):
        launch(tiny)


def test_the_loss_goes_down(tiny, launch, log_of):
    vae = Path(__file__).parents[3] / "recipes/demo/model/vae"
    folder = yaml.safe_load((vae.parents[1] / "train.yaml").read_text())["autoencoder"]
    tiny["autoencoder"] = {**folder, "weights": {"use": "hf", "path": str(vae)}}
    tiny["predictor"]["latent_channels"] = folder["latent_channels"]
    tiny["task"] |= {"steps": 200, "memory": True}
    tiny["loader"]["batch"] = 6
    tiny["optimizer"]["lr"] = 5e-3
    losses = [line["loss"] for line in log_of(launch(tiny))]
    assert sum(losses[-30:]) < 0.7 * sum(losses[:30])


def test_the_export_holds_the_trained_weights_and_is_a_whole_model(tiny, launch, tmp_path):
    tiny["task"] |= {"export": {"use": "hf"}, "export_whole": True}
    out = launch(tiny)
    trained = state_of(out / "checkpoints/step-00000004")
    [file] = (out / "model/transformer").glob("*.safetensors")
    exported = load_file(file)
    assert exported.keys() == {n.removeprefix("model.") for n in trained if n.startswith("model.")}
    assert all(torch.equal(tensor, trained[f"model.{name}"]) for name, tensor in exported.items())
    again = f"model: {out / 'model'}\nvideo: {{frames: 9, height: 32, width: 48}}\ntask: {{use: sample}}\n"
    spec = resolve(parse(again + "text_encoder: {tokenizer: bytes}\ndataset: {use: prompts, prompts: [a]}\n"))
    before = resolve(parse(yaml.safe_dump(tiny)))
    for section in ("predictor", "autoencoder", "scheduler"):
        assert spec.config(section).describe() == before.config(section).describe()


def test_an_interrupt_saves_and_stops_after_the_step(tiny, launch, log_of, monkeypatch):
    tiny["task"] |= {"steps": 30}
    real = loop.Loop._update

    def update(self, step, *rest):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, step, *rest)

    monkeypatch.setattr(loop.Loop, "_update", update)
    out = launch(tiny)
    assert len(log_of(out)) == 3
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(tiny, launch):
    tiny["optimizer"]["lr"] = 1e30
    tiny["task"] |= {"grad_clip": None, "steps": 20}
    with pytest.raises(
        CvxError, match=r"step \d+: (the loss is nan: it begins in|\d+ gradients are not finite)"
    ):
        launch(tiny)


def test_data_that_changed_goes_on_with_a_new_epoch_and_says_so(tiny, launch, tmp_path, caplog):
    caplog.set_level("INFO", logger="cvx")
    launch(tiny, **{"task.stop_at": 2})
    launch(tiny, **{"task.resume": "auto", "dataset.rows": 8})
    assert "the rows or their order changed: data goes on with a new epoch, 1" in caplog.text
    assert "dataset.rows: 6 -> 8" in caplog.text


def test_image_to_video_trains_with_its_condition(tiny, launch, log_of):
    tiny["predictor"] |= {"image_condition": True}
    tiny["task"] |= {"image_dropout": 0.5, "text_dropout": 0.5}
    assert all(line["grad_norm"] > 0 for line in log_of(launch(tiny)))


def test_an_odd_latent_count_is_padded_for_1_5(tiny, launch, log_of):
    tiny["predictor"] |= {"patch_t": 2}
    assert len(log_of(launch(tiny))) == 4


@pytest.mark.parametrize(
    ("use", "fields"), [("sat", {}), ("megatron", {"tp": 2, "pp": [1, 1]}), ("dcp", {}), ("hf", {})]
)
def test_the_export_can_be_of_any_format_that_a_recipe_reads(use, fields, tiny, launch):
    tiny["task"] |= {"export": {"use": use, **fields}, "steps": 1}
    out = launch(tiny)
    folder = out / "model/transformer" if use == "hf" else out / "model"
    tiny["predictor"]["weights"] = {"use": use, "path": str(folder)}
    tiny["task"].pop("export")
    spec = resolve(parse(yaml.safe_dump(tiny)))
    loaded = dict(place(build(spec), spec).predictor.named_parameters())
    [step] = (out / "checkpoints").iterdir()
    trained = state_of(step)
    assert len(loaded) > 30
    for name, parameter in loaded.items():
        assert torch.equal(parameter, trained[f"model.{name}"]), name


@pytest.mark.parametrize(
    ("export", "why"),
    [
        ({"use": "layerzero"}, "'layerzero' is read only"),
        ({"use": "peft"}, "'peft' holds LoRA weights only"),
        ({"use": "megatron", "tp": 7}, "tp=7 does not divide the model's 2 heads. Choose one of"),
    ],
)
def test_an_export_that_cannot_be_is_refused_before_training(export, why, tiny):
    tiny["task"] |= {"export": export}
    with pytest.raises(RecipeError, match=why):
        resolve(parse(yaml.safe_dump(tiny)))


def test_a_whole_export_needs_a_format_of_models(tiny):
    tiny["task"] |= {"export": {"use": "sat"}, "export_whole": True}
    with pytest.raises(RecipeError, match="'sat' holds one part only"):
        resolve(parse(yaml.safe_dump(tiny)))
