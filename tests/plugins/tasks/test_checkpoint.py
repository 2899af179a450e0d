"""Going on from a checkpoint: what changed is told, with what takes effect; damage costs one save."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from cvx_core import FormatError
from cvx_io import resume
from cvx_io.tensors.dcp_metadata import read_checkpoint
from cvx_plugins.tasks import checkpoint, loop


@pytest.fixture
def tiny(tiny):
    """Smaller still: images, one at a time."""
    return {**tiny, "video": {"frames": 1, "height": 32, "width": 32, "fps": 8}, "loader": {"batch": 1}}


def said(caplog) -> list[str]:
    return [record.getMessage().strip() for record in caplog.records if record.name == "cvx"]


def test_each_changed_field_says_whether_it_takes_effect(tiny, launch, log_of, tmp_path, caplog):
    model = launch(
        {**tiny, "task": {**tiny["task"], "export": {"use": "hf"}}},
        output=str(tmp_path / "m"),
        **{"task.steps": 1},
    )
    other = launch(
        {**tiny, "task": {**tiny["task"], "export": {"use": "hf"}}},
        output=str(tmp_path / "n"),
        **{"task.steps": 1},
    )
    tiny["predictor"]["weights"] = {"use": "hf", "path": str(model / "model/transformer")}
    launch(tiny, **{"task.stop_at": 2})
    caplog.set_level("INFO", "cvx")
    out = launch(
        tiny,
        **{
            "task.resume": "auto",
            "seed": 5,
            "optimizer.lr": 0.5,
            "optimizer.weight_decay": 0.25,
            "predictor.weights.path": str(other / "model/transformer"),
            "dataset.rows": 8,
        },
    )
    lines = {line.split(":")[0]: line for line in said(caplog)}
    assert lines["task.resume"].endswith("none -> auto: says where files are, and changes no step")
    assert "weights come from the checkpoint" in lines["predictor.weights.path"]
    assert ": NO EFFECT, since" in lines["predictor.weights.path"]
    assert lines["optimizer.lr"] == "optimizer.lr: 0.001 -> 0.5: takes effect from step 3 on"
    assert lines["dataset.rows"] == "dataset.rows: 6 -> 8: takes effect from step 3 on, with a new epoch"
    assert lines["seed"].endswith("for the order of rows, timesteps and noise, not for first weights")
    assert lines["task.stop_at"] == "task.stop_at: 2 -> None: takes effect from step 3 on"
    assert [line["lr"] for line in log_of(out)] == [0.001, 0.001, 0.5, 0.5]
    name = "optimizer.param_groups.transformer_blocks.0.attn1.to_q.weight.weight_decay"
    saved = {name: None}
    dcp.load(saved, checkpoint_id=out / "checkpoints/step-00000004", no_dist=True)
    assert saved == {name: 0.25}


def test_the_same_recipe_goes_on_without_a_word_of_change(tiny, launch, caplog):
    launch(tiny, **{"task.stop_at": 2, "task.resume": "auto"})
    caplog.set_level("INFO", "cvx")
    launch(tiny, **{"task.stop_at": 2, "task.resume": "auto"})
    assert not [line for line in said(caplog) if "->" in line or "fingerprint" in line]


def test_other_frozen_weights_and_versions_are_told(tiny, launch, tmp_path, caplog, monkeypatch):
    out = launch(tiny, **{"task.stop_at": 2})
    [path] = (out / "checkpoints").iterdir()
    manifest = json.loads((path / resume.MANIFEST).read_text())
    assert set(manifest["frozen"]) == {"text_encoder", "autoencoder"}
    assert manifest["versions"]["torch"] == torch.__version__
    assert "cvx" in manifest["versions"]
    manifest["frozen"]["autoencoder"] = "0" * 16
    manifest["versions"]["torch"] = "1.0"
    (path / resume.MANIFEST).write_text(json.dumps(manifest))
    launch(tiny, **{"task.resume": "auto"})
    assert any(line.startswith("autoencoder: not the weights that this run was") for line in said(caplog))
    assert any(line.startswith(f"torch was 1.0 and is {torch.__version__}") for line in said(caplog))
    assert not any(line.startswith("text_encoder") for line in said(caplog))


def test_a_run_goes_on_from_the_save_before_a_damaged_one(tiny, launch, tmp_path, caplog):
    whole = launch(tiny, output=str(tmp_path / "whole"))
    out = launch(tiny, output=str(tmp_path / "hit"), **{"task.save_every": 1, "task.keep": 3})
    newest = out / "checkpoints/step-00000004"
    [data] = newest.glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(FormatError, match="holds other bytes than were written"):
        launch(tiny, output=str(tmp_path / "other"), **{"task.resume": str(newest)})
    launch(tiny, output=str(out), **{"task.resume": "auto"})
    assert any("DAMAGED CHECKPOINT" in line and "goes on from step-00000003" in line for line in said(caplog))
    assert (whole / "log.jsonl").read_bytes() == (out / "log.jsonl").read_bytes()


def test_a_fingerprint_tells_weights_names_shapes_and_precision():
    def made(seed=0, width=3, kind=torch.float32, name="a"):
        torch.manual_seed(seed)
        return nn.ModuleDict({name: nn.Linear(width, 70)}).to(kind)

    def of(module):
        return checkpoint.fingerprint(module.named_parameters())

    first = of(made())
    assert of(made()) == first
    others = [made(seed=1), made(width=4), made(kind=torch.bfloat16), made(name="b")]
    assert len({first, *map(of, others)}) == 5
    changed = made()
    with torch.no_grad():
        changed["a"].weight[-1, -1] += 1
    assert of(changed) != first


LORA = {"use": "lora", "rank": 2, "alpha": 4}


def names_in(path) -> set[str]:
    return set(read_checkpoint(path).tensors)


def test_a_checkpoint_of_a_lora_holds_what_is_trained_and_goes_on_bit_for_bit(tiny, launch, tmp_path):
    tiny["adapter"] = LORA
    whole = launch(tiny, output=str(tmp_path / "whole"))
    out = launch(tiny, output=str(tmp_path / "halves"), **{"task.stop_at": 2})
    names = names_in(out / "checkpoints/step-00000002")
    models = {name for name in names if name.startswith("model.")}
    assert models
    assert all("lora_" in name for name in names if not name.endswith(".step"))
    launch(tiny, output=str(out), **{"task.resume": "auto"})
    assert (whole / "log.jsonl").read_bytes() == (out / "log.jsonl").read_bytes()
    same = "checkpoints/step-00000004"
    assert names_in(out / same) == names_in(whole / same)


def test_a_lora_does_not_go_on_with_another_base(tiny, launch, caplog):
    tiny["adapter"] = LORA
    launch(tiny, **{"task.stop_at": 2})
    with pytest.raises(FormatError, match=r"trained on other weights.*changed since: seed: 0 -> 1\. Give"):
        launch(tiny, seed=1, **{"task.resume": "auto"})
    caplog.set_level("INFO", "cvx")
    launch(tiny, **{"task.resume": "auto", "optimizer.lr": 0.5})
    assert "optimizer.lr: 0.001 -> 0.5: takes effect from step 3 on" in said(caplog)


def test_a_checkpoint_with_the_whole_model_gives_its_base_to_a_lora(tiny, launch, tmp_path, monkeypatch):
    tiny["adapter"] = LORA
    whole = launch(tiny, output=str(tmp_path / "whole"))
    with monkeypatch.context() as patch:  # as checkpoints were once
        patch.setattr(loop, "_TRAINED", loop._FLAT)
        patch.setattr(checkpoint, "facts", lambda *a, before=checkpoint.facts: {**before(*a), "frozen": {}})
        patch.setattr(loop.Loop._state, "__defaults__", (loop._FLAT,))
        out = launch(tiny, output=str(tmp_path / "halves"), **{"task.stop_at": 2})
    assert any("lora_" not in name for name in names_in(out / "checkpoints/step-00000002"))
    launch(tiny, output=str(out), seed=1, **{"task.resume": "auto", "task.stop_at": 3})
    first = manifest_of(whole / "checkpoints/step-00000004")["frozen"]["predictor"]
    assert manifest_of(out / "checkpoints/step-00000003")["frozen"]["predictor"] == first
    with pytest.raises(FormatError, match="trained on other weights"):
        launch(tiny, output=str(out), seed=1, **{"task.resume": "auto"})
    launch(tiny, output=str(out), **{"task.resume": "auto"})


def manifest_of(path) -> dict:
    return json.loads((path / resume.MANIFEST).read_text())
