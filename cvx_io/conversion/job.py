"""One conversion: found out, checked and reported without reading weights, then run."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cvx_core.errors import FormatError
from cvx_core.interfaces import Deps, Format, TensorInfo, Tensors
from cvx_core.registry import Component, Registry
from cvx_core.weights import check_index
from cvx_io.atomic import is_in_use, is_left_over, left_overs, staged, write_json
from cvx_io.conversion import loras
from cvx_io.conversion.detect import (
    PICKLES,
    Model,
    find_format,
    is_canonical,
    name_model,
    open_source,
    settle,
)
from cvx_io.conversion.report import End, Report
from cvx_io.conversion.request import Request, configured, naming
from cvx_io.conversion.verify import verify
from cvx_io.lora import ALPHA, compare
from cvx_io.pieces import ByPieces, pieces
from cvx_io.progress import progress, size_text
from cvx_io.regroup import listed
from cvx_io.rename import Names
from cvx_io.tensors.dtypes import is_float

REPORT = "conversion.json"
FLOATS = ("float", "bfloat")
SUFFIXES = (".safetensors", ".pt", ".distcp", ".json")
TRACKERS = ("latest", "latest_checkpointed_iteration.txt", ".metadata")
"""What files of checkpoints end in, or are called."""


@dataclass(frozen=True)
class Job:
    """A conversion that is ready to run. tensors: what will be written, under canonical names."""

    request: Request
    tensors: Tensors
    model: Model
    format: Format
    names: Names | None
    config: Mapping[str, Any] | None
    report: Report

    def check(self) -> None:
        """Raise FormatError where the disk is too small or the target is in the way."""
        check_target(self.request)
        check_space(self.request.target.resolve(), self.report.target.size)

    def run(self, verified: bool = False) -> Report:
        """Write the target, whole or not at all, and its report beside it; `verified` reads it again.

        Raises FormatError as `check` does, and where what was written differs.
        """
        self.check()
        target = self.request.target.resolve()  # where a link leads is replaced, not the link
        _remove_left(target)
        with naming(self.request), _disk_errors(self.request.target), staged(target) as place:
            try:
                with progress("convert", self.report.target.size, in_bytes=True) as bar:
                    self.format.write(place, _watched(self.tensors, bar), self.names, self.config)
                report = replace(self.report, checked=self._checked(place, verified))
            except FormatError as error:  # formats know only where they write for the time being
                raise FormatError(str(error).replace(str(place), str(self.request.target))) from error
            write_json(report_path(place), report.to_json())
        return report

    def _checked(self, place: Path, verified: bool) -> list[str]:
        """Read what was written where that was asked for; LoRA weights, which are small, in any case."""
        target = self.request.target
        if self.model.family == loras.FAMILY:
            compare(self.format.open(place, self.names), self.tensors, str(target))
            return ["alpha / rank * B A read again: equal for every layer"]
        if not verified:
            return []
        return verify(self.format.open(place, self.names), self.tensors, self.model, target)


def prepare(request: Request, registry: Registry | None = None) -> Job:
    """Find out what a request means and account for every tensor; no weights are read.

    Raises FormatError where format, model, names, shapes or settings do not fit, naming the tensors.
    """
    registry = registry or Registry.discover()
    target = registry.get("format", request.to)
    _check_kind(request.target, target)
    source = find_format(request.source, registry, request.source_format)
    with naming(request):
        loras.check_options(request, source, target)
        if loras.is_wanted(source, target):
            job = _adapter_job(request, registry, *loras.formats(source, target, registry))
        else:
            job = _weights_job(request, registry, source, target)
    return replace(job, report=replace(job.report, notes=[*job.report.notes, *_left(request.target)]))


def _check_kind(path: Path, target: Component) -> None:
    """Raise FormatError where a target is named as a file would be, but the format writes a folder."""
    files = getattr(target.config, "files", None)
    if files is not None and path.suffix in (*PICKLES, ".safetensors") and path.suffix not in files:
        or_file = f", or of a {files[0]} file" if files else ""
        raise FormatError(
            f"{path}: {target.name} writes no {path.suffix} file. Give the path of a folder{or_file}."
        )


def _left(target: Path) -> list[str]:
    """Return a note on each thing that an interrupted conversion to the same target left."""
    notes = []
    for item in left_overs(target.resolve()):
        if item.suffix == ".old":
            told = f"an interrupted write put aside what was at {target}: {item}; rename it to have it back"
        elif is_in_use(item):
            told = f"left over from an interrupted write, unless another is still running; remove {item}"
        else:
            told = f"left over from an interrupted write, and removed by the next: {item}"
        notes.append(told)
    return notes


def _weights_job(request: Request, registry: Registry, source: Component, target: Component) -> Job:
    settings = loras.source_settings(request, source)
    opened = source.load()(configured(source, settings, "--set-from"), None)
    named = name_model(request.model, request.model_settings, registry) if request.model else None
    found, model = open_source(request.source, opened, source, registry, named)
    if model is None:
        raise FormatError(
            f"{request.source}: no installed component recognises these tensors: {listed(list(found.index))}."
            " Name the model with --model, or install the plugin that has it."
        )
    model = settle(model, request.model_settings) if named is None else model
    names = registry.table(model.family, target)
    tensors, dropped, invented = arranged(found, model, names, str(request.source), request.dtype)
    notes: list[str] = []
    if request.lora is not None:
        tensors, note = loras.merged(tensors, request, registry)
        notes.append(note)
    cast, changed = _cast(tensors, request.dtype)
    config = configured(target, request.settings, "--set")
    _check_settings(config, model)
    described = _described(model, target) if model.component is not None else _carried(request, found, target)
    written = target.load()(config, None)
    if hasattr(written, "check"):
        written.check(request.target, cast, names)
    foreign = names.write(cast, str(request.target)) if names is not None else cast
    report = Report(
        source=End(request.source, source.name, settings, found.index),
        target=End(request.target, target.name, request.settings, foreign.index),
        model=model.name,
        evidence=model.evidence,
        fields=_fields(model),
        consumed={name: list(origins) for name, origins in tensors.origins.items()},
        dropped={**found.dropped, **dropped},
        invented=invented,
        changed=changed,
        assumed={name: f"{value!r}, {why}" for name, (value, why) in model.assumed.items()},
        notes=notes,
    )
    return Job(request, cast, model, written, names, described, report)


def _adapter_job(request: Request, registry: Registry, source: Component, target: Component) -> Job:
    """Convert LoRA weights: no model is needed, for names and ranks say all."""
    opened, note = loras.opened(request, source, registry)
    config = configured(target, request.settings, "--set")
    names = None if is_canonical(target) else registry.table(loras.family(registry, target), target)
    tensors, changed = _cast(opened, request.dtype)
    written = target.load()(config, None)
    if hasattr(written, "check"):
        written.check(request.target, tensors, names)
    report = Report(
        source=End(request.source, source.name, request.source_settings, opened.index),
        target=End(request.target, target.name, request.settings, tensors.index),
        model="LoRA weights",
        evidence="",
        fields={},
        consumed={name: list(opened.origins.get(name, (name,))) for name in opened.index},
        dropped=opened.dropped,
        changed=changed,
        notes=[note],
    )
    return Job(request, tensors, Model(loras.FAMILY), written, names, None, report)


def arranged(
    found: Tensors, model: Model, names: Names | None, where: str, dtype: str | None = None
) -> tuple[Tensors, dict[str, str], dict[str, str]]:
    """Return what is written, in the order of the source: parameters, and tables the target holds too.

    Also {name: why it is dropped} and {name: how it is made}. Raises FormatError where the source does not
    fit the model.
    """
    if model.component is None:
        return found, {}, {}
    module = built(model)
    wanted = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    computed = model.config.computed() if hasattr(model.config, "computed") else {}
    aliases: Mapping[str, str | None] = getattr(module, "aliases", {})
    try:
        coverage = check_index(found.index, wanted, f"{where} as {model.name}", aliases)
    except FormatError as error:
        hint = (
            "  Is a file of a rank, stage or shard missing? Else say what it is with --model and --set-model."
        )
        raise FormatError(f"{error}\n{hint}") from error
    target_of = dict(coverage.consumed)
    kept = names.keeps if names is not None else ()
    insisted = names.insists if names is not None else ()
    carried = [name for name in coverage.dropped if name in (*kept, *insisted)]
    target_of |= {name: name for name in carried}
    dropped = {name: why for name, why in coverage.dropped.items() if name not in carried}
    source_of = {target_of[name]: name for name in found.index if name in target_of}
    index = {target: found.index[name] for target, name in source_of.items()}
    missing = [name for name in computed if name in insisted and name not in index]
    _check_known(model, missing)
    dtype = dtype or index[next(iter(wanted))].dtype
    made = {name: computed[name]().to(_torch_dtype(dtype)) for name in missing}
    index |= {name: TensorInfo(tuple(tensor.shape), dtype) for name, tensor in made.items()}

    def make(name: str) -> Iterable[Any]:
        return [made[name]] if name in made else pieces(found, source_of[name])

    invented = dict.fromkeys(
        missing, "computed from the model's sizes; the target's own loader insists on it"
    )
    origins = {target: found.origins.get(name, (name,)) for target, name in source_of.items()}
    return Tensors(index, ByPieces(index, make), origins=origins), dropped, invented


def built(model: Model) -> Any:
    """Return a model's module on the meta device: names and shapes, no memory."""
    import torch

    assert model.component is not None
    try:
        with torch.device("meta"):
            return model.component.load()(model.config, Deps())
    except RuntimeError as error:
        raise FormatError(
            f"a {model.name} of these sizes cannot be built: {error}. Check --set-model, and the config.json."
        ) from error


def _check_known(model: Model, needed: Any) -> None:
    if needed and model.unknown:
        lines = "\n".join(f"  {name}: {why}" for name, why in model.unknown.items())
        raise FormatError(
            f"the target depends on what these weights do not tell:\n{lines}\n"
            "State it with --set-model FIELD=VALUE, or name the model with --model."
        )


def _described(model: Model, target: Component) -> Mapping[str, Any] | None:
    """Return the model's config.json, for formats that keep one."""
    if not getattr(target.config, "keeps_config", False) or not hasattr(model.config, "describe"):
        return None
    if model.unknown and not getattr(target.config, "needs_config", False):
        return None
    _check_known(model, True)
    described: Mapping[str, Any] = model.config.describe()
    return described


def _carried(request: Request, found: Tensors, target: Component) -> Mapping[str, Any] | None:
    """Return the source's own config.json, for a model that no component describes."""
    if not getattr(target.config, "keeps_config", False):
        return None
    config: Mapping[str, Any] | None = found.facts.get("config")
    insists = getattr(target.config, "needs_config", False) and request.target.suffix != ".safetensors"
    if config is None and insists:
        raise FormatError(
            f"{request.target}: a folder needs a config.json, and {request.source} has none to take over. "
            "Give a path that ends in .safetensors, and put the model's config.json beside it."
        )
    return config


def _check_settings(config: Any, model: Model) -> None:
    plan = getattr(model.config, "plan", None)
    if plan is not None and hasattr(config, "unfit") and (why := config.unfit(plan())):
        raise FormatError(f"{model.name}: {why}")


def _fields(model: Model) -> dict[str, Any]:
    if model.config is None:
        return {}
    fields: dict[str, Any] = model.config.model_dump(mode="json", exclude_defaults=True)
    return fields


def _cast(tensors: Tensors, dtype: str | None) -> tuple[Tensors, dict[str, int]]:
    """Return tensors with every floating point one in `dtype`, and how many change."""
    if dtype is None:
        return tensors, {}
    if not is_float(dtype):
        raise FormatError(f"--dtype {dtype}: expected float16, bfloat16, float32 or float64.")
    changing = {
        name: info.dtype
        for name, info in tensors.index.items()
        if info.dtype.startswith(FLOATS) and info.dtype != dtype and not name.endswith(ALPHA)
    }
    index = {**tensors.index, **{name: TensorInfo(tensors.index[name].shape, dtype) for name in changing}}

    def make(name: str) -> Iterator[Any]:
        for piece in pieces(tensors, name):
            yield piece.to(_torch_dtype(dtype)) if name in changing else piece

    counts = Counter(f"{old} -> {dtype}" for old in changing.values())
    return replace(tensors, index=index, load=ByPieces(index, make)), dict(counts)


def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _watched(tensors: Tensors, bar: Any) -> Tensors:
    def make(name: str) -> Iterator[Any]:
        for piece in pieces(tensors, name):
            bar.step(by=piece.nbytes)
            yield piece

    return replace(tensors, load=ByPieces(tensors.index, make))


def check_target(request: Request) -> None:
    """Raise FormatError where the target cannot be written, or holds anything but a conversion to replace."""
    target, here = request.target, request.target.resolve()
    if target.is_symlink() and not target.exists():
        raise FormatError(f"{target}: is a link that leads nowhere. Remove it, or choose another target.")
    for source in (request.source, request.lora):
        if source is not None:
            _check_apart(target, source)
    parent = next(folder for folder in here.parents if folder.exists())
    effective = os.access in os.supports_effective_ids
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK, effective_ids=effective):
        raise FormatError(
            f"{target}: cannot write in {parent}. Choose another place, or change its permissions."
        )
    if not here.exists():
        return
    if here == Path.cwd() or here in Path.cwd().parents:
        raise FormatError(f"{target}: holds the current folder. Give a folder in it, such as {here / 'out'}.")
    if here.is_dir() and not any(here.iterdir()):
        return
    if not request.overwrite:
        hint = "" if report_path(here).exists() else " It has no finished conversion in it."
        raise FormatError(
            f"{target}: exists already.{hint} Give --overwrite to replace it, or another target."
        )
    if here.is_file() and here.suffix not in (".safetensors", ".pt"):
        raise FormatError(
            f"{target}: --overwrite replaces checkpoints only, and this is another file. Remove it "
            "yourself, or choose another target."
        )
    if here.is_dir() and (other := _other_things(here)):
        raise FormatError(
            f"{target}: --overwrite replaces checkpoints only, and this folder holds other things: "
            f"{listed(other)}. Remove it yourself, or choose another target."
        )


def _check_apart(target: Path, source: Path) -> None:
    here, there = target.resolve(), source.resolve()
    if here == there or here in there.parents:
        raise FormatError(f"{target}: holds the source {source}. Choose another target.")
    if there in here.parents and there.is_dir():
        raise FormatError(f"{target}: lies inside the source {source}. Choose a target outside of it.")


def _other_things(folder: Path) -> list[str]:
    """Return what makes a folder more than one checkpoint: other files, all of them if it is of no format."""
    files = [file for file in sorted(folder.rglob("*")) if not file.is_dir()]
    other = [file for file in files if file.suffix not in SUFFIXES and file.name not in TRACKERS]
    if not other and not (folder / REPORT).exists():
        try:
            find_format(folder, Registry.discover())
        except FormatError:
            other = files
    return [str(file.relative_to(folder)) for file in other]


def check_space(target: Path, size: int) -> None:
    """Raise FormatError where the disk has less room than the target needs."""
    parent = next(folder for folder in target.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < size * 1.01:
        raise FormatError(
            f"{target}: needs {size_text(size)}, but {parent} has {size_text(free)} free. Make room, or "
            "choose another disk. Nothing was written."
        )


def report_path(target: Path) -> Path:
    """Return where a conversion's report lies: in its folder, or beside its file."""
    return target / REPORT if target.is_dir() else target.with_name(f"{target.name}.{REPORT}")


def _remove_left(target: Path) -> None:
    """Remove what killed conversions to a target had written; never what one put aside."""
    for item in left_overs(target):
        if not is_in_use(item):
            shutil.rmtree(item, ignore_errors=True)


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turn the system's refusals while writing into a FormatError that says what to do."""
    try:
        yield
    except OSError as error:
        file = error.filename
        where = f" ({file})" if file is not None and not is_left_over(Path(file)) else ""
        raise FormatError(
            f"{target}: not written: {error.strerror or error}{where}. Nothing is left behind; make room or "
            "change the permissions, then convert again."
        ) from error
