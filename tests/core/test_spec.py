"""Resolving: components, presets, defaults from the card, cross-component rules, every problem at once."""

import json
from typing import Any, ClassVar, Literal

import pytest
import yaml

from cvx_core import Card, Component, Config, InputPath, OutputPath, Problem, RecipeError, Registry
from cvx_core.recipe import load, parse
from cvx_core.run_config import TaskConfig
from cvx_core.schema import schema
from cvx_core.spec import resolve


class ModelConfig(Config):
    family: ClassVar[str] = "fake"
    layers: int = 2
    kind: str = "plain"
    card: Card = Card()

    def rules(self):
        return self.card


class VaeConfig(Config):
    scale_factor: float = 1.0
    extra: tuple[int, ...] = ()

    def check(self, spec):
        if self.extra == (13,):
            yield Problem("extra", "13 is unlucky.")


class FileConfig(Config):
    path: InputPath | None = None

    @classmethod
    def sections(cls, path, _registry):
        if not (path / "marker").exists():
            return None
        weights = {"use": "file", "path": str(path / "marker")}
        model = {"use": "model", "layers": 7, "weights": weights}
        return {"predictor": model, "autoencoder": {"use": "vae"}, "scheduler": {"use": "ddim"}}, [
            "found a model"
        ]


class JobConfig(TaskConfig):
    needs: ClassVar = ("predictor", "loader")
    optional: ClassVar = ("autoencoder",)
    target: OutputPath | None = None
    resume: Literal["none", "auto"] | InputPath = "none"
    export: Any = None
    nested: ClassVar = {"export": "format"}


class OtherConfig(Config):
    number: int = 0


TALL = {
    "card": {
        "frames_step": 8,
        "frames_max": 49,
        "size_step": 16,
        "fps": 12,
        "video": [25, 32, 48],
        "latent_scale": 0.5,
    }
}


@pytest.fixture
def registry():
    return Registry(
        [
            Component("predictor", "model", ModelConfig, "x:y"),
            Component("predictor", "model-tall", ModelConfig, "x:y", preset={"layers": 5, **TALL}),
            Component("autoencoder", "vae", VaeConfig, "x:y"),
            Component("scheduler", "ddim", OtherConfig, "x:y"),
            Component("dataset", "rows", OtherConfig, "x:y"),
            Component("format", "file", FileConfig, "x:y"),
            Component("task", "job", JobConfig, "x:y"),
        ]
    )


def problems(text, registry, source="r.yaml"):
    with pytest.raises(RecipeError) as caught:
        resolve(parse(text, source), registry)
    return [str(problem) for problem in caught.value.problems]


JOB = "task: {use: job}\npredictor: {use: model}\n"


def test_a_preset_gives_defaults_and_a_recipe_overrides_them(registry):
    spec = resolve(
        parse("task: {use: job}\npredictor: {use: model-tall, card: {frames_max: 25}}\n"), registry
    )
    config = spec.config("predictor")
    assert (config.layers, config.card.frames_max, config.card.frames_step) == (5, 25, 8)


def test_the_card_fills_what_the_recipe_leaves_open(registry):
    text = "task: {use: job}\npredictor: {use: model-tall}\nautoencoder: {use: vae}\n"
    spec = resolve(parse(text), registry)
    assert (spec.video.frames, spec.video.height, spec.video.fps) == (25, 32, 12)
    assert spec.config("autoencoder").scale_factor == 0.5


def test_a_value_against_the_card_is_refused_with_both(registry):
    text = "task: {use: job}\npredictor: {use: model-tall}\nautoencoder:\n  use: vae\n  scale_factor: 0.7\n"
    [problem] = problems(text, registry)
    assert problem.startswith(
        "r.yaml:5: autoencoder.scale_factor: is 0.7, but predictor 'model-tall' needs 0.5."
    )


def test_illegal_geometry_says_the_legal_values(registry):
    text = "task: {use: job}\npredictor: {use: model-tall}\nvideo: {frames: 21, height: 250, width: 64}\n"
    frames, height = problems(text, registry)
    assert frames.endswith(
        "got 21; predictor 'model-tall' takes 8*N+1 frames up to 49. Nearest: 17 or 25. To train on it "
        "nevertheless, state predictor.card.frames_step: 4."
    )
    assert height.endswith("got 250; predictor 'model-tall' takes multiples of 16. Nearest: 240 or 256.")


def test_every_problem_comes_in_one_go_in_order_of_lines(registry):
    text = "nope: 1\ntask: {use: jib}\npredictor:\n  use: model\n  layer: 3\n  kind: 4\nautoencoder: vae\n"
    found = problems(text, registry)
    assert [p.split(": ")[0] for p in found] == ["r.yaml:1", "r.yaml:2", "r.yaml:5", "r.yaml:6", "r.yaml:7"]
    assert "Did you mean 'job'?" in found[1]
    assert "'model' has no such field. Did you mean 'layers'?" in found[2]
    assert "got 4; expected text." in found[3]
    assert "expected a mapping with `use:`" in found[4]


def test_a_section_the_task_does_not_read_is_an_error(registry):
    [problem] = problems(JOB + "dataset: {use: rows}\n", registry)
    assert problem == "r.yaml:3: dataset: task 'job' does not use it. Remove the section."


def test_a_needed_section_that_is_absent_is_an_error(registry):
    [problem] = problems("task: {use: job}\n", registry)
    assert (
        "task 'job' needs it. Add `predictor: {use: ...}` or `model: PATH`. Known: model, model-tall."
        in problem
    )


def test_a_components_own_check_is_reported_at_its_line(registry):
    assert problems(JOB + "autoencoder: {use: vae, extra: [13]}\n", registry) == [
        "r.yaml:3: autoencoder.extra: 13 is unlucky."
    ]


def test_input_paths_must_exist_and_start_at_the_recipe(registry, tmp_path):
    (tmp_path / "w").write_text("")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "task: {use: job, target: out}\npredictor: {use: model, weights: {use: file, path: w}}\n"
    )
    spec = resolve(load(recipe), registry)
    assert spec.choices["predictor"].weights.config.path == tmp_path / "w"
    assert spec.config("task").target == tmp_path / "out"
    assert resolve(load(recipe, ["task.resume=auto"]), registry).config("task").resume == "auto"
    with pytest.raises(RecipeError, match=r"task.resume: no such file"):
        resolve(load(recipe, ["task.resume=other"]), registry)
    with pytest.raises(RecipeError, match=r"predictor.weights.path: no such file or folder: .*/gone"):
        resolve(load(recipe, ["predictor.weights.path=gone"]), registry)


def test_nested_components_are_resolved(registry):
    spec = resolve(parse("task: {use: job, export: {use: file}}\npredictor: {use: model}\n"), registry)
    assert spec.config("task").export.name == "file"
    [problem] = problems("predictor: {use: model}\ntask:\n  use: job\n  export: {use: fil}\n", registry)
    assert problem.startswith("r.yaml:4: task.export.use: no format 'fil'. Did you mean 'file'?")


def test_model_shorthand_fills_sections_and_the_recipe_overrides_them(registry, tmp_path):
    (tmp_path / "marker").write_text("")
    text = f"task: {{use: job}}\nmodel: {tmp_path}\n"
    spec = resolve(parse(text), registry)
    assert spec.config("predictor").layers == 7
    assert "scheduler" not in spec.choices, "a part that the task does not read is left out"
    assert "found a model" in spec.notes
    changed = resolve(parse(text + "predictor: {use: model, layers: 3}\n"), registry)
    assert changed.config("predictor").layers == 3
    assert changed.choices["predictor"].weights is not None


@pytest.mark.parametrize(("value", "says"), [("gone", "no such folder"), ("3", "expected the path")])
def test_a_model_that_is_not_there_is_an_error(registry, value, says):
    assert any(says in p for p in problems(f"task: {{use: job}}\nmodel: {value}\n", registry))


def test_the_resolved_recipe_runs_as_it_is_and_keeps_its_digest(registry):
    text = "task: {use: job, export: {use: file}}\npredictor: {use: model-tall}\nautoencoder: {use: vae}\n"
    spec = resolve(parse(text), registry)
    again = resolve(parse(spec.to_yaml()), registry)
    assert yaml.safe_load(spec.to_yaml())["predictor"]["layers"] == 5
    assert again.resolved == spec.resolved
    assert again.digest == spec.digest
    assert resolve(parse(text + "seed: 1\n"), registry).digest != spec.digest


def test_the_schema_covers_every_component(registry):
    result = json.loads(json.dumps(schema(registry)))
    models = result["$defs"]["predictor"]["anyOf"]
    assert [m["properties"]["use"]["const"] for m in models] == ["model", "model-tall"]
    assert models[1]["properties"]["layers"]["default"] == 5
    assert result["$defs"]["task"]["anyOf"][0]["properties"]["export"] == {"$ref": "#/$defs/format"}


@pytest.mark.parametrize("value", ["5", "true", "2.0", "[1]"])
def test_types_are_strict(registry, value):
    text = f"task: {{use: job}}\npredictor: {{use: model, kind: {value}}}\n"
    assert "expected text" in problems(text, registry)[0]
