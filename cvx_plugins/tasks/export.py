"""Writing trained weights through a format, so that a recipe can name the folder as its model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from cvx_core.interfaces import Deps, Parts, Piece, Tensors
from cvx_core.mesh import Mesh
from cvx_core.registry import Choice
from cvx_core.spec import Spec
from cvx_io.conversion.detect import Model
from cvx_io.conversion.job import arranged
from cvx_io.regroup import listed
from cvx_parallel.whole import write_whole

log = logging.getLogger("cvx")
WHOLE = ("predictor", "autoencoder", "text_encoder", "scheduler")


def export_model(parts: Parts, spec: Spec, target: Choice, whole: bool) -> None:
    """Write <output>/model: the predictor, and where `whole` everything else that sampling needs.

    Every rank calls this; the first one writes.
    """
    folder = spec.output / "model"
    change = parts.adapter.merged if parts.adapter is not None else _same
    if not getattr(target.config, "holds_models", False):
        export_component(parts.predictor, spec.choices["predictor"], folder, target, spec, parts.mesh, change)
        return
    sections = WHOLE if whole else WHOLE[:1]
    found = {section: getattr(parts, section) for section in sections}
    modules = {section: part for section, part in found.items() if isinstance(part, nn.Module)}

    def write(tensors: Mapping[str, Tensors]) -> None:
        pieces = {}
        tensors = {**tensors, "predictor": change(tensors["predictor"])}
        for section in sections:
            config = spec.config(section)
            tokenizer = getattr(config, "tokenizer", None)
            extra = tokenizer if isinstance(tokenizer, Path) else None
            pieces[section] = Piece(config.describe(), tensors.get(section), extra)
        target.build(Deps()).write_model(folder, pieces)

    write_whole(modules, parts.mesh, write)
    log.info("exported %s", folder)


def export_adapter(parts: Parts, spec: Spec, target: Choice | None) -> None:
    """Check that the adapter changes the predictor; write <output>/adapter, or adapter.safetensors, and read
    it again. target: None does not write.

    Every rank calls this; the first one writes. Raises CvxError where the adapter has no effect.
    """
    adapter, predictor = parts.adapter, spec.choices["predictor"]

    def write(tensors: Mapping[str, Tensors]) -> None:
        if still := adapter.effect(tensors["predictor"]):
            log.warning("adapter: %d modules are not changed: %s", len(still), listed(still))
        if target is None:
            return
        held = adapter.held(tensors["predictor"])
        is_file = getattr(target.config, "is_file", False)
        path = spec.output / ("adapter.safetensors" if is_file else "adapter")
        names = spec.registry.table(getattr(predictor.config, "family", predictor.name), target.component)
        written = target.build(Deps())
        written.write(path, held, names)
        adapter.compare(written.open(path, names), held, str(path))
        log.info("exported %s as %s; read again, it changes every weight alike", path, target.name)

    write_whole({"predictor": parts.predictor}, parts.mesh, write)


def _same(tensors: Tensors) -> Tensors:
    return tensors


def export_component(
    module: nn.Module,
    choice: Choice,
    folder: Path,
    target: Choice,
    spec: Spec,
    mesh: Mesh,
    change: Callable[[Tensors], Tensors] = _same,
) -> None:
    """Write one module's weights, and its config where the format keeps one, as a conversion would.

    change: what is done to the tensors before. Every rank calls this; the first one writes.
    """
    model = Model(getattr(choice.config, "family", choice.name), choice.component, choice.config)
    names = spec.registry.table(model.family, target.component)

    def write(tensors: Mapping[str, Tensors]) -> None:
        stored, _, invented = arranged(change(tensors["module"]), model, names, str(spec.output))
        target.build(Deps()).write(folder, stored, names, choice.config.describe())
        log.info("exported %s as %s", folder, target.name)
        for name, how in invented.items():
            log.info("  %s: %s", name, how)

    write_whole({"module": module}, mesh, write)
