"""Going on from a checkpoint: what changed is told, with what takes effect; damage costs one save."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from cvx_core import FormatError
from cvx_io import resume
from cvx_plugins.tasks import checkpoint


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

    first = checkpoint.fingerprint(made())
    assert checkpoint.fingerprint(made()) == first
    others = [made(seed=1), made(width=4), made(kind=torch.bfloat16), made(name="b")]
    assert len({first, *map(checkpoint.fingerprint, others)}) == 5
    changed = made()
    with torch.no_grad():
        changed["a"].weight[-1, -1] += 1
    assert checkpoint.fingerprint(changed) != first
