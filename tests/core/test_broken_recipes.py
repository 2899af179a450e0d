"""Recipes with mistakes people make: exit code 2, no traceback, file:line, what is wrong and what to do."""

import textwrap

import pytest

from cvx_core import run

BASE = """
video: {frames: 9, height: 32, width: 48}
predictor:
  use: cogvideox
  num_layers: 1
  num_heads: 2
  head_dim: 16
  latent_channels: 4
  text_dim: 32
text_encoder: {use: t5, num_layers: 1, dim: 32, num_heads: 2, tokenizer: bytes}
autoencoder: {use: cogvideox-vae, latent_channels: 4, base_channels: 8, blocks_per_level: 1}
dataset: {use: synthetic, rows: 4}
task:
  use: train
  steps: 2
"""

LARGE = """
predictor: {use: PRESET}
video: VIDEO
text_encoder: {use: t5-xxl, tokenizer: bytes}
autoencoder: {use: cogvideox-vae}
dataset: {use: synthetic, rows: 4}
task: {use: train}
"""


def base(*replacements):
    text = BASE
    for old, new in replacements:
        assert old in text, old
        text = text.replace(old, new)
    return text


def large(preset, video, **sections):
    text = LARGE.replace("PRESET", preset).replace("VIDEO", video)
    return text + "".join(f"{name}: {value}\n" for name, value in sections.items())


BROKEN = {
    "typo in a field": (
        base(("num_layers", "num_layer")),
        ["r.yaml:5: predictor.num_layer: 'cogvideox' has no such field. Did you mean 'num_layers'?"],
    ),
    "typo in a section": (
        base(("dataset:", "datset:")),
        ["r.yaml:12: datset: no such section. Did you mean 'dataset'?", "task 'train' needs it"],
    ),
    "wrong type": (
        base(("num_heads: 2\n", "num_heads: two\n")),
        ["r.yaml:6: predictor.num_heads: got 'two'; expected a whole number."],
    ),
    "fraction for a count": (
        base(("steps: 2", "steps: 2.5")),
        ["task.steps: got 2.5; expected a whole number."],
    ),
    "negative count": (
        base(("steps: 2", "steps: -2")),
        ["task.steps: got -2;", "greater than or equal to 1"],
    ),
    "text for a switch": (
        base(("steps: 2", "steps: 2\n  memory: yes")),
        ["r.yaml:16: task.memory: got 'yes'; expected true or false."],
    ),
    "duplicate key": (
        base(("steps: 2", "steps: 2\n  steps: 3")),
        ["r.yaml:16: task.steps: given twice, first on line 15. Remove one."],
    ),
    "unknown plugin": (
        base(("use: cogvideox\n", "use: cogvideo-x\n")),
        ["r.yaml:4: predictor.use: no predictor 'cogvideo-x'. Did you mean 'cogvideox'?"],
    ),
    "no use": (base(("  use: train\n", "")), ["r.yaml:13: task: got", "expected a mapping with `use:`"]),
    "no task": (
        base(("task:\n  use: train\n  steps: 2\n", "")),
        ["task: is required. Add `task: {use: ...}`"],
    ),
    "frames that fit no latent": (
        base(("frames: 9", "frames: 10")),
        ["r.yaml:2: video.frames: got 10; predictor 'cogvideox' takes 4*N+1 frames. Nearest: 9 or 13."],
    ),
    "more frames than 1.0 knows": (
        large("cogvideox-5b", "{frames: 81, height: 480, width: 720}"),
        ["r.yaml:3: video.frames: got 81; predictor 'cogvideox-5b' takes 8*N+1 frames up to 49."],
    ),
    "frames that 1.5 was not trained on": (
        large("cogvideox-1.5-5b", "{frames: 49, height: 768, width: 1360}", seed=1).replace("49", "45"),
        ["got 45; predictor 'cogvideox-1.5-5b' takes 16*N+1 frames up to 161. Nearest: 33 or 49."],
    ),
    "a size that patches do not fill": (
        base(("height: 32", "height: 40")),
        ["video.height: got 40; predictor 'cogvideox' takes multiples of 16. Nearest: 32 or 48."],
    ),
    "another size for learned positions": (
        large("cogvideox-5b-i2v", "{frames: 49, height: 768, width: 1360}"),
        ["r.yaml:3: video: got 768x1360 (height x width); predictor 'cogvideox-5b-i2v' takes 480x720 only."],
    ),
    "another schedule than the release's": (
        large("cogvideox-2b", "{frames: 49}", scheduler="{use: ddim, snr_shift: 1.0}"),
        ["r.yaml:8: scheduler.snr_shift: is 1.0, but predictor 'cogvideox-2b' needs 3.0."],
    ),
    "another latent scale": (
        large("cogvideox-2b", "{frames: 49}").replace("cogvideox-vae}", "cogvideox-vae, scale_factor: 0.7}"),
        ["r.yaml:5: autoencoder.scale_factor: is 0.7, but predictor 'cogvideox-2b' needs 1.15258426."],
    ),
    "another text length": (
        large("cogvideox-1.5-5b", "{frames: 81}").replace("tokenizer", "max_length: 226, tokenizer"),
        ["r.yaml:4: text_encoder.max_length: is 226, but predictor 'cogvideox-1.5-5b' needs 224."],
    ),
    "another text width": (
        base(("dim: 32, num_heads", "dim: 64, num_heads")),
        ["text_encoder.dim: is 64, but predictor 'cogvideox' needs 32."],
    ),
    "other latent channels": (
        base(("latent_channels: 4, base", "latent_channels: 16, base")),
        ["autoencoder.latent_channels: is 16, but predictor 'cogvideox' needs 4."],
    ),
    "head width that cannot rotate": (
        base(("head_dim: 16", "head_dim: 12")),
        ["r.yaml:3: predictor: head_dim is 12; rotary positions need a multiple of 16"],
    ),
    "missing file": (
        base(("{use: synthetic, rows: 4}", "{use: jsonl, path: gone.jsonl}")),
        [
            "r.yaml:12: dataset.path: no such file or folder:",
            "gone.jsonl. Relative paths start at the recipe's folder.",
        ],
    ),
    "missing weights": (
        base(("  num_layers: 1\n", "  num_layers: 1\n  weights: {use: hf, path: gone}\n")),
        ["r.yaml:6: predictor.weights.path: no such file or folder:"],
    ),
    "weights from nowhere": (
        base(("  num_layers: 1\n", "  num_layers: 1\n  weights: {use: hf}\n")),
        ["r.yaml:6: predictor.weights: needs a path."],
    ),
    "missing model": ("model: gone\n" + base(), ["r.yaml:1: model: no such folder:"]),
    "resume from nowhere": (
        base(("steps: 2", "steps: 2\n  resume: gone")),
        ["r.yaml:16: task.resume: no such file or folder:"],
    ),
    "a section the task does not read": (
        base(("use: train", "use: evaluate"), ("  steps: 2\n", "")) + "optimizer: {use: adamw}\n",
        ["optimizer: task 'evaluate' does not use it. Remove the section."],
    ),
    "sampling without weights": (
        base(("use: train", "use: sample")),
        [
            "predictor 'cogvideox' has no weights, so this samples noise.",
            "autoencoder 'cogvideox-vae' has no weights",
        ],
    ),
    "bad literal": (
        base(("steps: 2", "steps: 2\n  schedule: cosin")),
        ["task.schedule: got 'cosin';", "Did you mean 'cosine'?"],
    ),
    "stop past the end": (
        base(("steps: 2", "steps: 2\n  stop_at: 3")),
        ["r.yaml:13: task: stop_at 3 is past steps 2; leave it out."],
    ),
    "two problems at once": (
        base(
            ("  num_layers: 1\n  num", "  num_layer: 1\n  num"),
            ("frames: 9", "frames: nine"),
            ("use: synthetic", "use: synthetc"),
        ),
        [
            "r.yaml:2: video.frames: got 'nine'; expected a whole number.",
            "r.yaml:5: predictor.num_layer:",
            "r.yaml:12: dataset.use: no dataset 'synthetc'. Did you mean 'synthetic'?",
            "3 problems; nothing was built.",
        ],
    ),
    "not YAML": ("task: [\n", ["r.yaml:2: not valid YAML"]),
    "another schema version": ("cvx: 2\n" + base(), ["r.yaml:1: cvx: got 2; expected 1."]),
    "code in a recipe": ("task: !!python/name:os.system {}\n", ["is not allowed"]),
    "empty": ("", ["task: is required"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_recipe_is_explained(name, tmp_path, monkeypatch, capsys):
    text, expected = BROKEN[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(textwrap.dedent(text))
    assert run.main(["r.yaml", "--check"]) == 2
    error = capsys.readouterr().err
    for part in expected:
        assert part in error, error
    assert "Traceback" not in error
    assert "nothing was built" in error
    assert not (tmp_path / "runs").exists()


def test_the_base_of_the_broken_recipes_is_sound(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for text in (base(), large("cogvideox-1.5-5b", "{frames: 81, height: 768, width: 1360}")):
        (tmp_path / "r.yaml").write_text(text)
        assert run.main(["r.yaml", "--check"]) == 0, capsys.readouterr().err
