"""What a check notes about strategies, what it says to names and fields of others, and --world."""

import pytest

from cvx_core import RecipeError, resolve, run
from cvx_core.config import Config
from cvx_core.recipe import parse
from cvx_core.registry import Component, PluginError, Registry
from cvx_core.strategy import Stage, StrategyConfig
from tests.distributed.test_wrong_meshes import TRAIN, recipe


class Acme(StrategyConfig):
    stage = Stage.RUN
    compared = ("tp", "zero3")


@pytest.fixture(scope="module")
def registry():
    strange = Component("strategy", "acme-run", Acme, "acme:run")
    return Registry([*Registry.discover().all(), (strange, "acme")])


def noted(entries, registry, world=None, rows=2):
    text = recipe(entries, TRAIN.replace("batch: 2", f"batch: {rows}"))
    found = resolve(parse(text), registry, world).notes
    return [note for note in found if note.startswith(("pp", "recompute", "layerzero", "acme"))]


@pytest.mark.parametrize(
    ("entries", "rows", "says"),
    [
        (["ddp", "recompute, every: 3"], 2, None),
        (["recompute, every: 9"], 2, "recompute: every 9 recomputes one block of the 4 that a rank has"),
        (
            ["pp", "recompute, every: 2"],
            2,
            "recompute: every 2 recomputes one block of the 2 that a rank has",
        ),
        (["pp, stages: [1, 3]", "recompute, every: 2"], 2, None),
        (["pp"], 2, None),
        (["pp"], 1, "pp: one microbatch (loader.batch 1), so that one rank of 2 works at a time."),
        (["pp, microbatches: 1"], 2, "pp: one microbatch (microbatches: 1), so that one rank of 2 works at"),
        (["acme-run", "tp", "zero3"], 2, None),
        (["acme-run", "ddp"], 2, "acme-run with ddp: this pair is not among those compared with one process"),
        (["cp, ring: 2", "acme-run"], 2, "acme-run with cp: this pair is not among those compared with one"),
        (["acme-run"], 2, None),
    ],
)
def test_what_is_allowed_but_worth_knowing_is_noted(entries, rows, says, registry):
    notes = noted(entries, registry, rows=rows)
    assert [note[: len(says or "")] for note in notes] == ([says] if says else [])


@pytest.mark.parametrize(("world", "ranks"), [(None, None), (2, 2), (4, 4), (8, None), (16, None)])
def test_a_usual_size_that_gives_way_is_noted(world, ranks, registry):
    says = f"layerzero: zero3_size {ranks}, which is all data ranks; with more of them it is 8"
    assert noted(["layerzero"], registry, world) == ([says] if ranks else [])
    assert noted(["layerzero, zero3_size: 2"], registry, world) == []


def test_notes_are_in_the_report(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(recipe(["layerzero"], TRAIN))
    assert run.main([str(path), "--check", "--world", "4"]) == 0
    assert "\n  layerzero: zero3_size 4, which is all data ranks" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["0", "-3", "two", "1.5", ""])
def test_a_number_of_processes_is_1_or_more(number, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run.main([str(tmp_path / "r.yaml"), "--check", f"--world={number}"])
    assert ended.value.code == 2
    assert f"got {number!r}; expected the number of processes, 1 or more" in capsys.readouterr().err


def test_a_number_of_processes_is_for_a_check_only(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(recipe(["ddp"], TRAIN))
    assert run.main([str(path), "--world", "2"]) == 2
    assert capsys.readouterr().err.startswith("--world 2 goes with --check.")


def test_zero_processes_are_refused_in_the_library_too():
    with pytest.raises(RecipeError, match=r"a run has 0 processes\. Give 1 or more\."):
        resolve(parse(recipe(["ddp"], TRAIN)), world=0)


class Known(Config):
    also_called = {"other": "`{use: known, size: 2}`"}
    foreign = {"width": "sizes are those of the model. Leave it out."}
    weight: int = 1


def test_names_and_fields_of_others_are_known():
    registry = Registry([Component("strategy", "known", Known, "acme:x")])
    with pytest.raises(
        PluginError, match=r"no strategy 'other'\. Here that is `\{use: known, size: 2\}`\. Kno"
    ):
        registry.get("strategy", "other")
    with pytest.raises(PluginError, match=r"no strategy 'knwon'\. Did you mean 'known'\?"):
        registry.get("strategy", "knwon")
    text = "parallel: [{use: known, width: 3}]\n"
    with pytest.raises(RecipeError, match="width: 'known' has no such field: sizes are those of the model"):
        resolve(parse(text), registry)
