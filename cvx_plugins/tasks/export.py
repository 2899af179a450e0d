"""Writing trained weights through a format, so that a recipe can name the folder as its model."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from cvx_core.interfaces import Deps, Parts, Piece, Tensors
from cvx_core.registry import Choice
from cvx_core.spec import Spec
from cvx_io.conversion.detect import Model
from cvx_io.conversion.job import arranged
from cvx_io.regroup import describe

log = logging.getLogger("cvx")
WHOLE = ("predictor", "autoencoder", "text_encoder", "scheduler")


def export_model(parts: Parts, spec: Spec, target: Choice, whole: bool) -> None:
    """Write <output>/model: the predictor, and where `whole` everything else that sampling needs."""
    folder = spec.output / "model"
    if not getattr(target.config, "holds_models", False):
        export_component(parts.predictor, spec.choices["predictor"], folder, target, spec)
        return
    pieces = {}
    for section in WHOLE if whole else WHOLE[:1]:
        part, config = getattr(parts, section), spec.config(section)
        tensors = _tensors(part) if isinstance(part, nn.Module) else None
        tokenizer = getattr(config, "tokenizer", None)
        extra = tokenizer if isinstance(tokenizer, Path) else None
        pieces[section] = Piece(config.describe(), tensors, extra)
    target.build(Deps()).write_model(folder, pieces)
    log.info("exported %s", folder)


def export_component(module: nn.Module, choice: Choice, folder: Path, target: Choice, spec: Spec) -> None:
    """Write one module's weights, and its config where the format keeps one, as a conversion would."""
    model = Model(getattr(choice.config, "family", choice.name), choice.component, choice.config)
    names = spec.registry.table(model.family, target.component)
    tensors, _, invented = arranged(_tensors(module), model, names, str(spec.output))
    target.build(Deps()).write(folder, tensors, names, choice.config.describe())
    log.info("exported %s as %s", folder, target.name)
    for name, how in invented.items():
        log.info("  %s: %s", name, how)


def _tensors(module: nn.Module) -> Tensors:
    params = dict(module.named_parameters())
    index = {name: describe(parameter) for name, parameter in params.items()}
    return Tensors(index, lambda name: params[name].detach().cpu())
