"""The docs are true: their recipes pass the check, their commands exist, their links lead somewhere."""

import json
import re
from pathlib import Path

import pytest
import yaml

from cvx_core import Registry, run

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(page for folder in ("docs", "examples", "recipes") for page in ROOT.glob(f"{folder}/**/*.md")),
    ]
)


def blocks(language):
    return [
        pytest.param(text, id=f"{page.name}-{number}")
        for page in PAGES
        for number, text in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S))
    ]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with everything the recipes of the docs name: releases as configs alone, clips, prompts."""
    for folder, preset in (("CogVideoX-5b", "cogvideox-5b"), ("CogVideoX1.5-5B-I2V", "cogvideox-1.5-5b-i2v")):
        release(tmp_path / "weights" / folder, preset)
    (tmp_path / "data").mkdir()
    for listing in ("data/clips.jsonl", "data/held-out.jsonl"):
        (tmp_path / listing).write_text("")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    for folder in ("runs/cache", "data/latents", "data/texts"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("data/clips.csv", "data/empty.npz"):
        (tmp_path / file).write_bytes(b"")
    (tmp_path / "runs/cats/adapter").mkdir(parents=True)
    (tmp_path / "style.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def release(folder, preset):
    """Write the configs of a released pipeline; its weight files are empty, for nothing reads them here."""
    registry = Registry.discover()

    def config_of(kind, name, **fields):
        component = registry.get(kind, name)
        return component.config(**{**component.preset, **fields}).describe()

    image = preset.endswith("i2v")
    parts = {
        "transformer/config.json": config_of("predictor", preset),
        "vae/config.json": config_of("autoencoder", "cogvideox-vae", invert_scale_latents=image),
        "text_encoder/config.json": config_of("text_encoder", "t5-xxl"),
        "scheduler/scheduler_config.json": config_of("scheduler", "ddim"),
        "model_index.json": {"_class_name": "CogVideoXPipeline"},
    }
    for name, value in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    for part, stem in (
        ("transformer", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        (folder / part / f"{stem}.safetensors").write_bytes(b"")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/spiece.model").write_bytes(b"")


@pytest.mark.parametrize("text", blocks("yaml"))
def test_every_recipe_in_the_docs_passes_the_check(text, workplace, capsys):
    Path("recipe.yaml").write_text(text)
    assert run.main(["recipe.yaml", "--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda p: p.name)
def test_every_shipped_recipe_passes_the_check(path, capsys):
    assert run.main([str(path), "--check"]) == 0, capsys.readouterr().err


def test_the_recipe_in_the_docs_is_the_shipped_one():
    [text] = [b.values[0] for b in blocks("yaml") if "recipes/tiny.yaml" in b.values[0]]
    shipped = yaml.safe_load((ROOT / "recipes/tiny.yaml").read_text())
    assert yaml.safe_load(text).items() <= shipped.items()


def test_the_strategy_in_the_docs_is_the_example():
    chapter = (ROOT / "docs/plugins.md").read_text().partition("## Writing a strategy")[2]
    shown = re.findall(r"```python\n(.*?)```", chapter, re.S)
    files = ("acme_hsdp.py", "tests/test_conformance.py")
    source = "\n".join((ROOT / "examples/acme-hsdp" / file).read_text() for file in files)
    assert len(shown) == 3
    for text in shown:
        assert text in source


@pytest.mark.parametrize("text", blocks("sh"))
def test_every_command_in_the_docs_exists(text):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in text.splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        for path in (word for word in words if word.startswith(("recipes/", "examples/", "./examples/"))):
            assert (ROOT / path).exists(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
