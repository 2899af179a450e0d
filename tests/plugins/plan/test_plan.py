"""The task: shipped recipes, pipelines, changes that make a run fit, and what is sent."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from cvx_core.errors import RecipeError
from cvx_core.recipe import load, parse
from cvx_core.run import main
from cvx_core.spec import resolve
from cvx_plugins.plan.figures import planned
from cvx_plugins.plan.layout import Layout
from cvx_plugins.plan.passes import Sample
from cvx_plugins.plan.switches import changes
from tests.plugins.plan.recipes import plan_of, text

RECIPES = Path(__file__).parents[3] / "recipes/plan"
BILLIONS = {
    "5b": (5.4, 5.7),
    "10b": (9.9, 10.1),
    "15b": (14.4, 14.7),
    "20b": (19.9, 20.3),
    "30b": (29.3, 29.7),
}


@pytest.mark.parametrize("name", BILLIONS)
def test_shipped_recipes_pass_the_check(name, capsys):
    assert main([str(RECIPES / f"{name}.yaml"), "--check"]) == 0
    assert "processes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "30b" else [pytest.mark.slow]) for n in BILLIONS]
)
def test_shipped_recipes_run(name, tmp_path):
    began = time.process_time()
    assert main([str(RECIPES / f"{name}.yaml"), "--set", f"output={tmp_path}"]) == 0
    spent = time.process_time() - began
    data = json.loads((tmp_path / "plan.json").read_text())
    least, most = BILLIONS[name]
    spec = resolve(load(RECIPES / f"{name}.yaml"))
    count = sum(p.numel() for p in Layout(spec).predictor.parameters())
    assert least * 1e9 < count < most * 1e9
    assert data["fits"] or any(change["fits"] for change in data["changes"])
    if name == "30b":
        assert spent < 10


def test_a_pipeline_keeps_more_microbatches_where_it_begins():
    spec = plan_of([{"use": "pp", "size": 2}, {"use": "zero3"}], 4, num_layers=8)
    first, last = planned(spec).stages
    assert first.activations > last.activations
    all_at_once = plan_of([{"use": "pp", "size": 2, "schedule": "gpipe"}, {"use": "zero3"}], 4, num_layers=8)
    assert planned(all_at_once).stages[1].activations > 1.5 * last.activations


def test_what_is_sent_for_parameters():
    def sent(*parallel, **task):
        return planned(plan_of(list(parallel), 4, task=task, temb_dim=20)).stages[0].exchange["data"]

    whole = planned(plan_of([{"use": "ddp"}], 4, temb_dim=20)).stages[0].gradients
    share = whole * 3 / 4
    assert sent({"use": "ddp"}) == 2 * share
    assert sent({"use": "zero1"}) == 3 * share
    assert sent({"use": "zero2"}) == 2 * share
    assert sent({"use": "zero3"}) == 3 * share
    assert sent({"use": "zero3"}, accumulate=2) == 5 * share
    # In groups of 2: three times half of it; between groups, of what a rank holds: an all-reduce of gradients
    # and an exchange of updated rows.
    assert sent({"use": "layerzero", "zero3_size": 2}) == 3 * whole / 2 + (2 + 1) * (whole / 2) / 2


def test_changes_are_ranked_by_cost_and_fit_as_said():
    before = planned(plan_of([{"use": "zero2"}], 8))
    limit = before.peak * 0.9 / 1e9
    spec = plan_of([{"use": "zero2"}], 8, task={"memory_gb": limit, "flops": 1, "bandwidth_gb": 1})
    found = changes(spec, planned(spec))
    fitting = [change for change in found if change.fits]
    assert fitting
    assert all(change.peak <= limit * 1e9 for change in fitting)
    full = [change.cost for change in fitting if not change.trains_less]
    assert full == sorted(full)
    assert {"recompute", "zero3", "cp ulysses 2", "tp 2 sequence", "pp 2", "lora"} <= {
        change.names[0] for change in found
    }


def test_what_changes_share_is_what_each_would_work_out():
    tried = [
        [{"use": "zero2"}],
        [{"use": "zero3"}],
        [{"use": "zero2"}, {"use": "recompute"}],
        [{"use": "zero2"}, {"use": "tp"}],
        [{"use": "layerzero", "zero3_size": 2, "param_dtype": "bfloat16"}],
    ]
    cases = [(parallel, adapter) for parallel in tried for adapter in (None, {"use": "lora"})]
    specs = [plan_of(parallel, 4, num_layers=1, adapter=adapter) for parallel, adapter in cases]
    shared = Sample(specs[0])
    for spec, case in zip(specs, cases, strict=True):
        assert planned(spec, shared) == planned(spec), case


@pytest.mark.matrix
def test_where_no_change_is_enough_several_are_made():
    before = planned(plan_of([{"use": "ddp"}], 8))
    spec = plan_of([{"use": "ddp"}], 8, task={"memory_gb": before.peak * 0.02 / 1e9})
    assert max(len(change.names) for change in changes(spec, before)) == 3


def test_a_world_that_does_not_fit_the_mesh_is_refused():
    with pytest.raises(RecipeError, match="tp 2"):
        resolve(parse(text([{"use": "tp"}, {"use": "zero3"}], 7)))


@pytest.mark.matrix
def test_buckets_are_planned_one_by_one(tmp_path):
    recipe = yaml.safe_load(text([{"use": "zero2"}], 4, video={}, task={"flops": 1, "memory_gb": 1e-3}))
    table = {"48x80": {9: [0.5, 2], 1: [1.0, 8]}, "36p": {17: [1.0, 1]}, "96x96": {49: [0.0, 9]}}
    aspects = ["1:1", "16:9"]
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({**recipe, "loader": {"buckets": table, "aspects": aspects}, "output": str(tmp_path)})
    )
    assert main([str(tmp_path / "r.yaml")]) == 0
    data = json.loads((tmp_path / "plan.json").read_text())
    assert set(data["buckets"]) == {"48x80.9", "48x80.1", "36p.17"}  # one that keeps nothing aside
    for name, (frames, height, width, batch) in {
        "48x80.9": (9, 48, 80, 2),
        "48x80.1": (1, 48, 80, 8),
        "36p.17": (17, 48, 48, 1),
    }.items():
        video = {"frames": frames, "height": height, "width": width}
        alone = {**recipe, "video": video, "loader": {"batch": batch}}
        result = planned(resolve(parse(yaml.safe_dump(alone))))
        assert data["buckets"][name] == {
            "peak": result.peak,
            "rows": 4 * batch,
            "step": result.seconds["step"],
        }
    assert (
        data["peak"]
        == data["buckets"][data["bucket"]]["peak"]
        == max(one["peak"] for one in data["buckets"].values())
    )
    assert all(change["rows"] for change in data["changes"])
