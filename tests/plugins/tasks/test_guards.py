"""Values that are not finite are named where they begin; the run stops, or leaves out and counts the step."""

import re

import pytest
import torch

from cvx_core import CvxError, RecipeError
from cvx_plugins.tasks import guards, loop

BROKEN = "transformer_blocks.1.ff.net.2"


@pytest.fixture
def tiny(tiny):
    """Smaller still: images."""
    return {**tiny, "video": {"frames": 1, "height": 32, "width": 32, "fps": 8}}


@pytest.fixture
def broken_at(monkeypatch):
    """Have a module give NaN in some steps, counted from 1."""

    def go(*steps, how=lambda _module, _args, output: output * float("nan")):
        real = loop.Loop._accumulate

        def accumulate(self, stream, step, *rest):
            if step + 1 not in steps:
                return real(self, stream, step, *rest)
            handle = self._module.get_submodule(BROKEN).register_forward_hook(how)
            try:
                return real(self, stream, step, *rest)
            finally:
                handle.remove()

        monkeypatch.setattr(loop.Loop, "_accumulate", accumulate)

    return go


def test_a_loss_names_the_module_it_begins_in_the_rows_and_their_timesteps(tiny, launch, broken_at, log_of):
    broken_at(3)
    with pytest.raises(CvxError) as error:
        launch(tiny)
    rows = r"(\w|-)+ \(timestep \d+\)"
    assert error.match(rf"^step 3: the loss is nan: it begins in '{BROKEN}'\. Rows: {rows}, {rows}\. Nothing")


def test_a_weight_that_is_not_finite_is_named(tiny, launch, monkeypatch):
    real = loop.Loop._resume

    def resume(self, loader):
        with torch.no_grad():
            self._module.get_submodule(BROKEN).bias[0] = float("inf")
        return real(self, loader)

    monkeypatch.setattr(loop.Loop, "_resume", resume)
    with pytest.raises(CvxError, match=rf"begins in '{BROKEN}', whose bias is not finite\. Rows"):
        launch(tiny)


def test_what_comes_with_the_batch_is_not_blamed_on_a_module(tiny, launch, monkeypatch):
    from cvx_plugins.tasks import encode

    real = encode.pad_front
    monkeypatch.setattr(encode, "pad_front", lambda latent, card: real(latent, card) * float("nan"))
    with pytest.raises(CvxError, match=r"it comes with the batch: latent of its rows\. Rows"):
        launch(tiny)


@pytest.mark.parametrize("offload", [False, True])
def test_gradients_name_where_they_begin_on_the_way_back(tiny, launch, broken_at, offload):
    tiny["optimizer"]["offload"] = offload

    def how(_module, _args, output):
        output.register_hook(lambda gradient: gradient * float("nan"))

    broken_at(2, how=how)
    tiny["task"]["accumulate"] = 2
    with pytest.raises(
        CvxError, match=rf"^step 2: \d+ gradients are not finite, .* '{BROKEN}\.bias'"
    ) as told:
        launch(tiny)
    listed = re.search(r"Rows: (.*)\. Nothing", str(told.value)).group(1)
    assert re.fullmatch(r"(synthetic-\d+ \(timestep \d+\)(, )?){4}", listed), listed


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_that_are_left_out_change_nothing_and_are_counted(
    tiny, launch, broken_at, log_of, caplog, accumulate
):
    tiny["task"] |= {"non_finite": "skip", "accumulate": accumulate, "save_every": 1, "keep": 9}
    broken_at(2)
    out = launch(tiny)
    lines = log_of(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[1]["skipped"].startswith(f"the loss is nan: it begins in '{BROKEN}'")
    assert all(line["loss"] > 0 for line in lines if line["step"] != 2)
    assert "step 2 is left out, number 1 of this run: the loss is nan" in caplog.text
    assert "1 steps were left out; log.jsonl says which and why" in caplog.text
    from tests.plugins.tasks.test_train import state_of

    states = [state_of(out / f"checkpoints/step-0000000{step}") for step in (1, 2, 3)]
    weights = [{n: t for n, t in state.items() if n.startswith("model.")} for state in states]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[1][name], weights[2][name]) for name in weights[0])


def test_too_many_in_a_row_end_the_run(tiny, launch, broken_at):
    tiny["task"] |= {"non_finite": "skip", "skip_limit": 1, "steps": 6}
    broken_at(1, 3, 4)
    with pytest.raises(
        CvxError, match=r"step 4: 2 steps in a row had to be left out, more than task\.skip_limit"
    ):
        launch(tiny)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_that_changes_nothing_is_an_error(tiny, launch, steps):
    tiny["optimizer"]["lr"] = 0.0
    tiny["task"]["steps"] = steps
    with pytest.raises(CvxError, match=r"changed no parameter.*the learning rate, 0, is 0"):
        launch(tiny)


def test_a_limit_without_skipping_is_refused(tiny, launch):
    tiny["task"]["skip_limit"] = 3
    with pytest.raises(RecipeError, match="skip_limit has no meaning with non_finite: stop"):
        launch(tiny)


@pytest.mark.parametrize("place", range(3))
def test_a_change_of_any_watched_value_is_seen(place):
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((300,), (4, 5), (2, 2))]
    params[1].data = params[1].data.t()  # not contiguous
    optimizer = torch.optim.SGD(params)
    changed = guards.Changed(params, optimizer)
    assert not changed
    with torch.no_grad():
        params[place].view(-1 if place != 1 else (5, 4))[-1 if place else 255] += 1e-6
    assert changed


def test_a_master_of_another_size_than_before_is_a_change():
    params = [torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)) for size in (3, 2)]
    optimizer = torch.optim.SGD(params)
    changed = guards.Changed(params, optimizer)
    optimizer.state[params[1]]["master"] = torch.zeros(1)
    assert changed
