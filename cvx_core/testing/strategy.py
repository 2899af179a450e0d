"""What every strategy must satisfy: on several processes, the results of one, under the same names.

A small predictor is trained in float64 on `world` gloo processes of this machine's CPU, and in one process
without the strategy.
"""

from __future__ import annotations

import io
import math
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml

from cvx_core import run
from cvx_core.errors import CvxError, RecipeError
from cvx_core.mesh import AXES, DATA, Request, solve
from cvx_core.recipe import parse
from cvx_core.registry import Registry
from cvx_core.spec import resolve
from cvx_core.strategy import Stage
from cvx_core.testing import Suite
from cvx_core.testing.ranks import on_ranks

Entry = Mapping[str, Any]
CLOSE = 1e-10
"""Largest difference of losses and gradients, relative to the largest value of each."""
CLOSE_PARAMETERS = 1e-8
"""The same of parameters after updates: where a gradient is near zero, AdamW follows its sign."""
NEGLIGIBLE = 1e-6
"""Gradients are compared with the largest of all times this at least: of some only rounding is left."""
STEPS = 2
"""Of a run that is resumed after the first."""

RECIPE: Mapping[str, Any] = {
    "device": "cpu",
    "dtype": "float64",
    "video": {"frames": 9, "height": 48, "width": 48},
    "predictor": {
        "use": "cogvideox",
        "num_layers": 2,
        "num_heads": 3,
        "head_dim": 16,
        "latent_channels": 2,
        "text_dim": 12,
        "text_length": 5,
        "temb_dim": 16,
    },
    "text_encoder": {
        "use": "t5",
        "num_layers": 1,
        "dim": 12,
        "num_heads": 2,
        "max_length": 5,
        "tokenizer": "bytes",
    },
    "autoencoder": {
        "use": "cogvideox-vae",
        "latent_channels": 2,
        "base_channels": 4,
        "blocks_per_level": 1,
    },
    "optimizer": {"use": "adamw", "lr": 1e-3},
}
"""3 x 3 x 3 patches and 3 heads: little divides."""


@dataclass(frozen=True)
class Subject:
    """A strategy under test, and how it is tested. beside: other strategies that it is always run with."""

    name: str
    world: int
    fields: Mapping[str, Any]
    beside: tuple[Entry, ...]
    recipe: Mapping[str, Any]

    @property
    def config(self) -> Any:
        component = Registry.discover().get("strategy", self.name)
        assert component.config is not None, f"strategy {self.name!r} has no config"
        return component.config(**{**component.preset, **self.fields})

    @property
    def parallel(self) -> list[Entry]:
        return [{"use": self.name, **self.fields}, *self.beside]

    def requests(self, parallel: Iterable[Entry]) -> list[Request]:
        """Return what strategies ask of the mesh."""
        registry, result = Registry.discover(), []
        for entry in parallel:
            component = registry.get("strategy", entry["use"])
            given = {key: value for key, value in entry.items() if key != "use"}
            assert component.config is not None
            config: Any = component.config(**{**component.preset, **given})
            result.append(config.request(entry["use"]))
        return result

    def text(self, parallel: Iterable[Entry], rows: int = 1, **settings: Any) -> str:
        """Return a recipe. rows: of a batch and data rank; settings: of the task."""
        task = {"use": "train", "steps": STEPS, "save_every": 1, "keep": 9, "trackers": []}
        given = {key: value for key, value in self.recipe.items() if key != "task"}
        content = {
            **RECIPE,
            **given,
            "dataset": {"use": "synthetic", "rows": 16},
            "loader": {"batch": rows},
            "task": {**task, **self.recipe.get("task", {}), **settings},
            "parallel": [dict(entry) for entry in parallel],
        }
        return yaml.safe_dump(content, sort_keys=False)

    @cached_property
    def owns_data(self) -> bool:
        """Whether it takes a data axis, so that no other data strategy goes with it."""
        return any(axis in DATA for request in self.requests(self.parallel) for axis in request.degrees)

    @cached_property
    def alone(self) -> Ranks:
        """What the strategy does on `world` ranks: updates, a run, the run resumed, and in one process."""
        return _ranks(self, self.parallel, self.world, with_runs=True)

    @cached_property
    def with_ddp(self) -> Ranks:
        """What it does on twice as many, half of which read other rows."""
        return _ranks(self, [*self.parallel, {"use": "ddp", "size": 2}], 2 * self.world, with_runs=False)


@dataclass(frozen=True)
class Ranks:
    """What was seen on each rank, and in one process without the strategy.

    resumed: the last step of the run, made in one process from the ranks' checkpoint; or why it was not.
    """

    label: str
    seen: list[Any]
    reference: Any
    resumed: Any = None

    def steps(self) -> list[Any]:
        """Return each rank's updates."""
        self._check("made no update", [seen.step is not None for seen in self.seen])
        return [seen.step for seen in self.seen]

    def runs(self) -> list[list[Any]]:
        """Return each rank's runs: from the beginning, and resumed."""
        self.steps()
        self._check("did not run or resume the task", [len(seen.runs) == 2 for seen in self.seen])
        return [seen.runs for seen in self.seen]

    def _check(self, what: str, done: list[bool]) -> None:
        bad = [rank for rank, ok in enumerate(done) if not ok]
        errors = [f"rank {rank}:\n{self.seen[rank].error}" for rank in bad if self.seen[rank].error]
        why = "\n".join(errors) or "the names of the parameters are not those of one process"
        assert not bad, f"{self.label}: ranks {bad} {what}: {why}"


def suite(
    name: str,
    *,
    world: int = 2,
    beside: Iterable[Entry] = (),
    recipe: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Suite:
    """Return the checks of strategy `name`, made with `fields` on top of its preset.

    world: processes it is run on; 1 for a strategy that owns no axis. beside: entries of `parallel` that it
    cannot do without; recipe: sections that replace those of the kit's own recipe, such as `predictor`.
    """
    subject = Subject(name, world, fields, tuple(beside), recipe or {})
    return Suite.of(name, *_resolving(subject), *_running(subject))


def _resolving(subject: Subject) -> tuple[Callable[..., None], ...]:
    def its_recipe_passes_the_check(tmp_path: Path) -> None:
        stage = getattr(subject.config, "stage", None)
        assert isinstance(stage, Stage), f"stage is {stage!r}; state one of {[str(s) for s in Stage]}"
        file, said = tmp_path / "recipe.yaml", io.StringIO()
        file.write_text(subject.text(subject.parallel), encoding="utf-8")
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            code = run.main([str(file), "--check", "--world", str(subject.world)])
        assert code == 0, f"--check --world {subject.world} gave {code}: {said.getvalue()}"

    def its_degrees_fit_the_world() -> None:
        degrees = subject.config.degrees()
        unknown = [axis for axis in degrees if axis not in AXES]
        assert not unknown, f"degrees() names {unknown}; a mesh has {', '.join(AXES)}"
        wrong = {axis: size for axis, size in degrees.items() if not (size is None or _is_count(size))}
        assert not wrong, f"degrees() gives {wrong}; give 1 or more ranks, or None for what is left"
        named = subject.config.fields
        unknown = [field for field in named if field not in type(subject.config).model_fields]
        assert not unknown, f"`fields` names {unknown}, which the config has not"
        strange = {field: axes for field, axes in named.items() if not {*axes} <= {*degrees}}
        assert not strange, f"`fields` gives {strange}, but degrees() has {', '.join(degrees) or 'no axes'}"
        sizes = _stated(subject.requests(subject.parallel))
        product = math.prod(sizes.values())
        arithmetic = " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "nothing"
        assert product <= subject.world, (
            f"degrees() takes {arithmetic} = {product} ranks, but the kit was told world={subject.world}"
        )
        try:
            solve(subject.requests(subject.parallel), subject.world)
        except CvxError as error:
            raise AssertionError(f"degrees() takes {arithmetic} = {product} ranks: {error}") from error

    def a_field_that_it_has_not_is_refused_with_the_nearest() -> None:
        known = [*type(subject.config).model_fields, "use"]
        typo = f"{known[0]}_"
        entry = {**subject.parallel[0], typo: 1}
        message = _refusal(subject.text([entry, *subject.beside]), None)
        assert message, f"the unknown field {typo!r} was accepted"
        assert typo in message, f"the unknown field {typo!r} is not named: {message}"
        hint = f"Did you mean {known[0]!r}?"
        assert known[0] == "use" or hint in message, f"no {hint!r} in: {message}"

    def a_mesh_that_does_not_multiply_out_is_refused_before_any_group_forms(tmp_path: Path) -> None:
        parallel, ranks = _impossible(subject)
        assert _refusal(subject.text(parallel), ranks), f"{parallel} was accepted on {ranks} processes"
        file, said = tmp_path / "recipe.yaml", io.StringIO()
        file.write_text(subject.text(parallel), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
            patch.setenv("RANK", "0")
            patch.setenv("WORLD_SIZE", str(ranks))
            patch.setattr("torch.distributed.init_process_group", _forbidden)
            code = run.main([str(file)])
        assert (code, f"{ranks} processes" in said.getvalue()) == (2, True), (
            f"on {ranks} processes: exit code {code} instead of 2, or no word of them in: {said.getvalue()}"
        )

    return (
        its_recipe_passes_the_check,
        its_degrees_fit_the_world,
        a_field_that_it_has_not_is_refused_with_the_nearest,
        a_mesh_that_does_not_multiply_out_is_refused_before_any_group_forms,
    )


def _running(subject: Subject) -> tuple[Callable[[], None], ...]:
    def parameters_keep_their_names() -> None:
        _compare_names(subject.alone)

    def loss_and_every_gradient_are_those_of_one_process() -> None:
        _compare_gradients(subject.alone)

    def parameters_after_two_updates_are_those_of_one_process() -> None:
        _compare_parameters(subject.alone)

    def a_run_resumes_bit_for_bit() -> None:
        for rank, (first, again) in enumerate(subject.alone.runs()):
            assert again.records == first.records[1:], (
                f"{subject.alone.label}: the log of step {STEPS} is {again.records} after a resume, "
                f"{first.records[1:]} without"
            )
            for name, value in first.parameters.items():
                error = _relative(again.parameters[name], value)
                assert error == 0, (
                    f"{subject.alone.label}: rank {rank}: {name!r} differs by {error:.1e} of its largest "
                    "value after a resume; it must be the same bit for bit"
                )

    def a_run_resumes_in_one_process() -> None:
        found = subject.alone
        [[first, _], *_] = runs = found.runs()
        assert not isinstance(found.resumed, str), f"{found.label}: in one process:\n{found.resumed}"
        [mine], theirs = found.resumed.records, first.records[-1]
        assert mine["rows"] == theirs["rows"], (
            f"rows {mine['rows']} in one process, {theirs['rows']} on ranks"
        )
        error = abs(mine["loss"] - theirs["loss"]) / abs(mine["loss"])
        assert error <= CLOSE, (
            f"{found.label}: the loss of step {STEPS} is {theirs['loss']} on ranks, {mine['loss']} in one "
            f"process from the same checkpoint: {error:.1e} apart, of {CLOSE:.0e} allowed"
        )
        for rank, (one, _) in enumerate(runs):
            _assert_close(found.label, f"rank {rank}: step {STEPS}", one.parameters, found.resumed.parameters)

    def it_goes_with_ddp_or_owns_its_axis() -> None:
        if subject.owns_data:
            parallel = [*subject.parallel, {"use": "ddp", "size": 2}]
            message = _refusal(subject.text(parallel), None)
            assert "Keep one." in message, f"ddp takes the same axis, but that is not said: {message!r}"
            return
        _compare_names(subject.with_ddp)
        _compare_gradients(subject.with_ddp)
        _compare_parameters(subject.with_ddp)

    return (
        parameters_keep_their_names,
        loss_and_every_gradient_are_those_of_one_process,
        parameters_after_two_updates_are_those_of_one_process,
        a_run_resumes_bit_for_bit,
        a_run_resumes_in_one_process,
        it_goes_with_ddp_or_owns_its_axis,
    )


def _ranks(subject: Subject, parallel: list[Entry], world: int, with_runs: bool) -> Ranks:
    """Run on ranks and in one process; what goes wrong there is kept, for the checks to say."""
    from cvx_core.testing import training  # with torch

    label = f"{' x '.join(entry['use'] for entry in parallel)} on {world} processes"
    try:
        data = solve(subject.requests(parallel), world).size("batch")
    except CvxError as error:
        raise AssertionError(f"{label}: {error}") from error
    rows = 4 if 4 % data == 0 else 2 * data
    reference = one_process(subject.text((), rows), rows)
    with tempfile.TemporaryDirectory() as folder:

        def text(out: str, entries: Iterable[Entry], batch: int, **settings: Any) -> str:
            content = yaml.safe_load(subject.text(entries, batch, **settings))
            return yaml.safe_dump({**content, "output": f"{folder}/{out}"}, sort_keys=False)

        saved = f"{folder}/first/checkpoints/step-{STEPS - 1:08d}"
        first = text("first", parallel, rows // data)
        again = text("again", parallel, rows // data, resume=saved)
        seen = on_ranks(
            world, training.work, first, [first, again] if with_runs else [], rows, list(reference.parameters)
        )
        if not Path(saved).is_dir():
            return Ranks(label, seen, reference)
        try:
            resumed: Any = training.task_run(text("one", (), rows, resume=saved))
        except Exception:
            resumed = traceback.format_exc()
    return Ranks(label, seen, reference, resumed)


@cache
def one_process(text: str, rows: int) -> Any:
    """Return what one process does in two updates of a recipe without strategies."""
    from cvx_core.building import build
    from cvx_core.placing import place
    from cvx_core.testing import training  # with torch

    spec = resolve(parse(text))
    return training.two_updates(place(build(spec), spec), spec, rows)


def _compare_names(ranks: Ranks) -> None:
    errors = [f"rank {rank}:\n{seen.error}" for rank, seen in enumerate(ranks.seen) if not seen.names]
    assert not errors, f"{ranks.label}: cannot be placed: {'; '.join(errors)}"
    found = set().union(*(seen.names for seen in ranks.seen))
    expected = set(ranks.reference.parameters)
    lost, new = sorted(expected - found), sorted(found - expected)
    assert not lost, f"{ranks.label}: no rank has {len(lost)} parameters, first {lost[0]!r}; new: {new[:3]}"
    assert not new, f"{ranks.label}: {len(new)} parameters are new, first {new[0]!r}"


def _compare_gradients(ranks: Ranks) -> None:
    reference, steps = ranks.reference, ranks.steps()
    missing = reference.gradients.keys() - set().union(*(step.gradients for step in steps))
    assert not missing, (
        f"{ranks.label}: no rank has a gradient of {sorted(missing)[:3]} ({len(missing)} in all)"
    )
    largest = max(float(gradient.abs().max()) for gradient in reference.gradients.values())
    for rank, step in enumerate(steps):
        error = abs(step.loss - reference.loss) / abs(reference.loss)
        assert error <= CLOSE, (
            f"{ranks.label}: rank {rank}: the loss is {step.loss}, in one process {reference.loss}: "
            f"{error:.1e} apart, of {CLOSE:.0e} allowed"
        )
        _assert_close(
            ranks.label,
            f"rank {rank}: gradients",
            step.gradients,
            reference.gradients,
            CLOSE,
            NEGLIGIBLE * largest,
        )


def _compare_parameters(ranks: Ranks) -> None:
    for rank, step in enumerate(ranks.steps()):
        _assert_close(ranks.label, f"rank {rank}: two updates", step.parameters, ranks.reference.parameters)


def _assert_close(
    label: str,
    what: str,
    got: Mapping[str, Any],
    expected: Mapping[str, Any],
    close: float = CLOSE_PARAMETERS,
    least: float = 1e-30,
) -> None:
    """Compare those tensors that a rank has. least: what differences are relative to at least."""
    wrong = {}
    for name, value in got.items():
        want = expected[name]
        same = value.shape == want.shape
        error = _relative(value, want, least) if same else math.inf
        if not error <= close:
            ratio = float((value * want).sum() / want.square().sum()) if same else math.nan
            wrong[name] = (error, ratio, tuple(value.shape), tuple(want.shape))
    if wrong:
        name, (error, ratio, shape, expected_shape) = max(wrong.items(), key=lambda item: item[1][0])
        raise AssertionError(
            f"{label}: {what}: {len(wrong)} of {len(got)} tensors differ from one process's, most {name!r}: "
            f"{error:.1e} of its largest value, of {close:.0e} allowed; shapes {shape} and {expected_shape}; "
            f"as if multiplied by {ratio:.4g}"
        )


def _relative(got: Any, expected: Any, least: float = 1e-30) -> float:
    """Return the largest difference relative to the largest expected value, or to `least` if that is less."""
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(least))


def _is_count(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= 1


def _stated(requests: Iterable[Request]) -> dict[str, int]:
    return {axis: size for request in requests for axis, size in request.degrees.items() if size is not None}


def _impossible(subject: Subject) -> tuple[list[Entry], int]:
    """Return strategies and a number of processes that do not fit them."""
    parallel = subject.parallel
    requests = subject.requests(parallel)
    degrees = {axis: size for request in requests for axis, size in request.degrees.items()}
    if None in degrees.values() and math.prod(_stated(requests).values()) == 1:  # anything would fit
        parallel.append({"use": "tp", "size": 2} if "tp" not in degrees else {"use": "cp", "ulysses": 2})
    return parallel, math.prod(_stated(subject.requests(parallel)).values()) + 1


def _refusal(text: str, world: int | None) -> str:
    """Return why a recipe is refused, "" where it is not."""
    try:
        resolve(parse(text), world=world)
    except RecipeError as error:
        return str(error)
    return ""


def _forbidden(*_args: Any, **_kwargs: Any) -> None:
    raise AssertionError("a process group was formed")
