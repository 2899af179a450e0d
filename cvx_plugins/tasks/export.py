"""Writing trained weights through a format, so that a recipe can name the folder as its model."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cvx_core.interfaces import Deps, Parts
from cvx_core.registry import Choice
from cvx_core.spec import Spec
from cvx_io.atomic import write_json

log = logging.getLogger("cvx")
FOLDERS = {"predictor": "transformer", "autoencoder": "vae", "text_encoder": "text_encoder"}


def export_model(parts: Parts, spec: Spec, target: Choice, whole: bool) -> None:
    """Write <output>/model: the predictor, and where `whole` everything else that sampling needs."""
    folder = spec.output / "model"
    sections = ("predictor", "autoencoder", "text_encoder") if whole else ("predictor",)
    for section in sections:
        export_component(getattr(parts, section), spec.choices[section], folder / FOLDERS[section], target)
    classes = {FOLDERS[s]: _library_class(spec.choices[s].config.describe()) for s in sections}
    if whole:
        scheduler = spec.choices["scheduler"].config.describe()
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        classes["scheduler"] = _library_class(scheduler)
        classes |= _copy_tokenizer(spec, folder)
    if "predictor" in spec.choices and target.name == "hf":
        write_json(folder / "model_index.json", {"_class_name": _pipeline_class(spec), **classes})
    log.info("exported %s", folder)


def export_component(module: nn.Module, choice: Choice, folder: Path, target: Choice) -> None:
    """Write one module's weights and config."""
    target.build(Deps()).write(folder, _tensors(module), None, choice.config.describe())


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        yield name, parameter.detach().cpu()


def _library_class(config: Any) -> list[str]:
    if "_class_name" in config:
        return ["diffusers", config["_class_name"]]
    return ["transformers", config["architectures"][0]]


def _pipeline_class(spec: Spec) -> str:
    image = spec.card.image_latent != "none"
    return "CogVideoXImageToVideoPipeline" if image else "CogVideoXPipeline"


def _copy_tokenizer(spec: Spec, folder: Path) -> dict[str, list[str]]:
    """Copy the tokenizer's folder where the text encoder has one."""
    source = getattr(spec.config("text_encoder"), "tokenizer", None)
    if source is None or not Path(source).is_dir():
        return {}
    shutil.copytree(source, folder / "tokenizer", dirs_exist_ok=True)
    return {"tokenizer": ["transformers", "T5Tokenizer"]}
