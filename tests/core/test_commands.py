"""The commands: what they print, their exit codes, and that they stay light."""

import json
import subprocess
import sys

import pytest

from cvx_core import cli, run
from cvx_core.recipe import parse
from cvx_core.spec import resolve

RECIPE = """
video: {frames: 9, height: 32, width: 48}
predictor: {use: cogvideox, num_layers: 1, num_heads: 2, head_dim: 16, latent_channels: 4, text_dim: 32}
text_encoder: {use: t5, num_layers: 1, dim: 32, num_heads: 2, tokenizer: bytes}
autoencoder: {use: cogvideox-vae, latent_channels: 4, base_channels: 8, blocks_per_level: 1}
dataset: {use: synthetic, rows: 4}
task: {use: train, steps: 2}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def test_what_is_wrong_with_a_listing_shows_before_weights_are_read(recipe, capsys, monkeypatch):
    (recipe.parent / "clips.jsonl").write_text("no json\n")
    monkeypatch.setattr("cvx_core.placing.place", lambda *_: pytest.fail("weights are read"))
    recipe.write_text(RECIPE.replace("{use: synthetic, rows: 4}", "{use: jsonl, path: clips.jsonl}"))
    assert run.main([str(recipe), "--set", "video.fps=8"]) == 2
    assert "clips.jsonl:1:" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_ends_the_command_quietly():
    command = [sys.executable, "-m", "cvx_core.cli", "schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_pipe_that_breaks_elsewhere_is_not_hidden(monkeypatch):
    def broken(_argv):
        raise BrokenPipeError("a worker is gone")

    monkeypatch.setitem(cli.VERBS, "run", (broken, ""))
    with pytest.raises(BrokenPipeError, match="a worker is gone"):
        cli.main(["run"])


def test_check_says_what_a_recipe_resolves_to(recipe, capsys):
    assert run.main([str(recipe), "--check"]) == 0
    out = capsys.readouterr().out
    assert "tiny.yaml: ok" in out
    assert "predictor cogvideox" in out
    assert "autoencoder: random weights, from seed" in out
    assert "adapter" not in out
    assert "9 frames of 32x48 at 8 fps" in out
    assert str(recipe.parent / "runs" / "tiny") in out


def test_set_changes_one_value_and_its_errors_are_named(recipe, capsys):
    assert run.main([str(recipe), "--check", "--set", "video.frames=13"]) == 0
    assert "13 frames" in capsys.readouterr().out
    assert run.main([str(recipe), "--check", "--set", "video.frames=12"]) == 2
    assert "--set video.frames: video.frames: got 12;" in capsys.readouterr().err


def test_list_shows_a_kind_and_refuses_an_unknown_one(capsys):
    assert run.main(["--list", "predictor"]) == 0
    assert "cogvideox-1.5-5b-i2v" in capsys.readouterr().out
    assert run.main(["--list", "predictors"]) == 2
    assert "Kinds: predictor," in capsys.readouterr().err


def test_schema_is_json_that_names_every_component(capsys):
    assert run.main(["--schema"]) == 0
    assert "cogvideox-2b" in json.dumps(json.loads(capsys.readouterr().out)["$defs"]["predictor"])


def test_no_recipe_is_an_error_with_an_example(capsys):
    assert run.main([]) == 2
    assert "python -m cvx_core.run recipe.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["plugins", "task"], 0, "train-autoencoder"),
        (["schema"], 0, "JSON"),
        (["--help"], 0, "cvx run recipe.yaml"),
        ([], 0, "verbs:"),
        (["rn"], 2, "Did you mean 'run'?"),
    ],
)
def test_the_console_script_has_the_same_verbs(argv, code, says, capsys):
    try:
        actual = cli.main(argv)
    except SystemExit as stop:
        actual = stop.code
    assert actual == code
    printed = capsys.readouterr()
    assert says in printed.out + printed.err or says == "JSON"


@pytest.mark.parametrize("argv", [["--help"], ["--list"], ["--schema"], ["RECIPE", "--check"]])
def test_commands_import_no_torch(argv, recipe):
    argv = [str(recipe) if item == "RECIPE" else item for item in argv]
    code = (
        "import sys\nfrom cvx_core import run\n"
        f"try:\n    code = run.main({argv!r})\nexcept SystemExit as stop:\n    code = stop.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'av', 'decord', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_core_imports_no_torch():
    code = "import cvx_core, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_resolved_recipe_resolves_to_itself(recipe):
    spec = resolve(parse(RECIPE))
    assert resolve(parse(spec.to_yaml())).resolved == spec.resolved


def test_the_library_is_the_same_calls(recipe):
    import cvx_core as cvx

    spec = cvx.resolve(cvx.load(recipe, {"device": "cpu"}))
    parts = cvx.place(cvx.build(spec), spec)
    assert not next(parts.predictor.parameters()).is_meta
    with pytest.raises(AttributeError, match="nothing"):
        cvx.nothing  # noqa: B018
