"""The strategy kit passes an honest strategy and catches broken ones, each by the check that is about it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from cvx_core.testing import strategy

PLUGIN = '''
from dataclasses import replace
from typing import ClassVar

from cvx_core import Component, hookimpl
from cvx_core.strategy import Stage, StrategyConfig


class Config(StrategyConfig):
    stage: ClassVar[Stage] = Stage.SHARD
    size: int = 2
    fault: str = ""

    def degrees(self):
        return {"dp_shard": 1, "dp_replicate": 2 * self.size if self.fault == "degree" else self.size}


class Lax(Config):
    model_config = {"extra": "ignore"}


@hookimpl
def cvx_components():
    for name, config in (("acme-average", Config), ("acme-lax", Lax)):
        yield Component("strategy", name, config, "acme_average:Average", summary="averages gradients")


class Average:
    """Averages gradients once per step."""

    def __init__(self, cfg, deps):
        self.cfg = cfg

    def apply(self, parts):
        if self.cfg.fault == "names":
            parts.predictor.renamed = parts.predictor.proj_out
            del parts.predictor.proj_out
            return parts
        return replace(parts, after_backward=self.average(parts))

    def average(self, parts):
        import torch.distributed as dist

        group, steps = parts.mesh.group("loss"), []  # steps: what a checkpoint does not know of

        def after_backward():
            steps.append(1)
            for name, param in parts.predictor.named_parameters():
                dist.all_reduce(param.grad, group=group)
                param.grad /= dist.get_world_size(group)
                if self.cfg.fault == "scale" and name == "proj_out.weight":
                    param.grad *= 1.5
                if self.cfg.fault == "resume":
                    param.grad *= len(steps)

        return after_backward
'''
FAULTS = {
    "": {},
    "degree": {
        "its_recipe_passes_the_check": "2 processes",
        "its_degrees_fit_the_world": "dp_replicate 4 = 4 ranks, but the kit was told world=2",
    },
    "scale": {
        "loss_and_every_gradient_are_those_of_one_process": "gradients: 1 of [0-9]+ tensors differ .* most "
        "'proj_out.weight': 5.0e-01 of its largest value, of 1e-10 allowed; .* as if multiplied by 1.5",
    },
    "names": {"parameters_keep_their_names": "no rank has 2 parameters, first 'proj_out.bias'; new: "},
    "resume": {"a_run_resumes_bit_for_bit": "the log of step 2 is .* after a resume, .* without"},
}


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package with the strategies."""
    site = tmp_path / "site"
    info = site / "acme_average-1.dist-info"
    info.mkdir(parents=True)
    (site / "acme_average.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-average\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[cvx]\nacme-average = acme_average\n")
    monkeypatch.syspath_prepend(str(site))


def failures(name: str, tmp_path: Path, **fields: object) -> dict[str, str]:
    """Return what each check of the kit that fails has to say."""
    failed = {}
    for check, run in strategy.suite(name, **fields).checks.items():
        try:
            run(**({"tmp_path": tmp_path} if inspect.signature(run).parameters else {}))
        except AssertionError as error:
            failed[check.partition(".")[2]] = str(error)
    return failed


@pytest.mark.slow
@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_by_the_check_that_is_about_it(tmp_path, fault):
    failed = failures("acme-average", tmp_path, size=2, **({"fault": fault} if fault else {}))
    for check, message in FAULTS[fault].items():
        assert check in failed, failed
        assert re.search(message, failed[check]), failed[check]
    if not FAULTS[fault]:
        assert failed == {}


@pytest.mark.usefixtures("plugin")
def test_a_config_that_takes_any_field_is_found(tmp_path):
    check = strategy.suite("acme-lax").checks["acme-lax.a_field_that_it_has_not_is_refused_with_the_nearest"]
    with pytest.raises(AssertionError, match="the unknown field 'size_' was accepted"):
        check()
