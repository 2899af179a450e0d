"""Model folders as the Hugging Face libraries lay them out, and components that recognise them."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from pydantic import model_validator

from cvx_core import Card, Component, Config, Registry
from cvx_core.testing.format import as_tensors
from cvx_io.tensors.write import write_file


class FakeConfig(Config):
    """Recognises configs of one foreign class."""

    foreign_class: ClassVar[str] = ""
    asked: ClassVar[list[str]] = []

    size: int = 1

    @model_validator(mode="after")
    def _is_small(self):
        if self.size > 99:
            raise ValueError("size is at most 99")
        return self

    @classmethod
    def recognise(cls, foreign: Mapping[str, Any]) -> Mapping[str, Any] | None:
        FakeConfig.asked.append(cls.__name__)
        if foreign.get("_class_name") != cls.foreign_class:
            return None
        return {"use": cls.foreign_class.lower(), "size": foreign["size"]}


class NetConfig(FakeConfig):
    foreign_class = "Net"


class ImageNetConfig(FakeConfig):
    foreign_class = "ImageNet"

    card: Card = Card()

    def rules(self) -> Card:
        return Card(**{"image_latent": "scaled", **self.card.model_dump(exclude_unset=True)})


class CodecConfig(FakeConfig):
    foreign_class = "Codec"


class TextConfig(FakeConfig):
    foreign_class = "Text"
    tokenizer: str | None = None


class NamelessConfig(FakeConfig):
    @classmethod
    def recognise(cls, foreign: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return {"size": 3} if foreign.get("_class_name") == "Nameless" else None


class StepsConfig(FakeConfig):
    foreign_class = "Steps"


@pytest.fixture
def registry() -> Registry:
    """Fake components of every kind; two presets share the class NetConfig."""
    kinds = (
        ("predictor", "net", NetConfig),
        ("predictor", "net-large", NetConfig),
        ("predictor", "imagenet", ImageNetConfig),
        ("predictor", "nameless", NamelessConfig),
        ("autoencoder", "codec", CodecConfig),
        ("text_encoder", "text", TextConfig),
        ("scheduler", "steps", StepsConfig),
        ("scheduler", "cannot-recognise", Config),
    )
    FakeConfig.asked.clear()
    return Registry([Component(kind, name, config, "nowhere:none") for kind, name, config in kinds])


@pytest.fixture
def asked() -> list[str]:
    """The config classes that were shown a file, in order."""
    return FakeConfig.asked


@pytest.fixture
def component_folder():
    """Return a function that writes one component's folder."""

    def write(folder, class_name, weights=True, file="config.json", **fields):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps({"_class_name": class_name, "size": 2, **fields}))
        if weights:
            write_file(folder / "diffusion_pytorch_model.safetensors", as_tensors({"a": torch.ones(2)}))
        return folder

    return write


@pytest.fixture
def pipeline_folder(tmp_path, component_folder):
    """A complete pipeline folder."""
    folder = tmp_path / "model"
    component_folder(folder / "transformer", "Net")
    component_folder(folder / "vae", "Codec")
    component_folder(folder / "text_encoder", "Text")
    component_folder(folder / "scheduler", "Steps", weights=False, file="scheduler_config.json")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/spiece.model").write_text("pieces")
    index = {"_class_name": "Pipeline", "_diffusers_version": "0.30", "force_zeros": True}
    index |= {
        name: ["library", "Class"]
        for name in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    }
    index["image_encoder"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
