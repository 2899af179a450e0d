"""Recipes as text: strict YAML, marks, overrides."""

import math
from pathlib import Path

import pytest

from cvx_core.errors import RecipeError
from cvx_core.recipe import dotted, load, override, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("1_000", 1000),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("0o17", "0o17"),
        ("2024-01-01", "2024-01-01"),
        (".inf", math.inf),
        ("12:30:45", "12:30:45"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    assert parse(f"value: {text}").data == {"value": value}
    assert type(parse(f"value: {text}").data["value"]) is type(value)


def test_every_value_knows_its_line():
    recipe = parse("a:\n  b: 1\n  c:\n    - x\n    - y: 2\n", source="r.yaml")
    assert recipe.where(("a", "b")) == "r.yaml:2"
    assert recipe.where(("a", "c", 1, "y")) == "r.yaml:5"
    assert recipe.where(("a", "b", "missing")) == "r.yaml:2"
    assert recipe.where(("nowhere",)) == "r.yaml:1"


def test_all_duplicate_keys_are_reported_with_both_lines():
    with pytest.raises(RecipeError) as caught:
        parse("a: 1\nb: {c: 1, c: 2}\na: 2\n", source="r.yaml")
    assert [str(p) for p in caught.value.problems] == [
        "r.yaml:2: b.c: given twice, first on line 2. Remove one.",
        "r.yaml:3: a: given twice, first on line 1. Remove one.",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "a: !!python/object/apply:os.system ['true']",
            "tag 'tag:yaml.org,2002:python/object/apply:os.system'",
        ),
        ("a: &x {b: 1}\nc: *x", "anchors and aliases are not allowed"),
        ("a: [1, 2", "not valid YAML"),
        ("- a\n- b", "a recipe is a mapping"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: !mine 3", "tag '!mine' is not allowed"),
    ],
)
def test_text_that_is_more_than_data_is_refused(text, says):
    with pytest.raises(RecipeError, match="nothing was built") as caught:
        parse(text)
    assert says in str(caught.value)


def test_override_replaces_sets_and_appends_nothing():
    recipe = parse("a: {b: 1}\nl:\n  - {x: 1}\n")
    changed = override(recipe, ["a.b=2", "a.new.deep=[1, 2]", "l[0].x=yes", "top=1e-3"])
    assert changed.data == {"a": {"b": 2, "new": {"deep": [1, 2]}}, "l": [{"x": "yes"}], "top": 1e-3}
    assert changed.where(("a", "b")) == "--set a.b"
    assert recipe.data["a"] == {"b": 1}


def test_every_bad_override_is_reported():
    recipe = parse("a: 1\nl: [1]\n")
    with pytest.raises(RecipeError) as caught:
        override(recipe, ["nothing", "a.b=1", "l[4]=2", "x=[1"])
    assert len(caught.value.problems) == 4
    assert "expected key=value" in str(caught.value.problems[0])


def test_override_by_mapping_takes_values_as_they_are():
    assert override(parse("a: 1"), {"a": "no", "b": [1]}).data == {"a": "no", "b": [1]}


def test_relative_paths_start_at_the_recipe_but_overrides_at_the_working_directory(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("a: x\nb: y\n")
    recipe = load(file, ["b=z"])
    assert recipe.base_of(("a",)) == tmp_path.resolve()
    assert recipe.base_of(("b",)) == Path.cwd()


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00a"])
def test_a_file_that_cannot_be_read_is_a_recipe_error(tmp_path, content):
    file = tmp_path / "r.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        load(file)


def test_dotted_writes_indices_in_brackets():
    assert dotted(("parallel", 1, "use")) == "parallel[1].use"
