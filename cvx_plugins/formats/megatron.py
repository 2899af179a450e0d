"""Megatron trees: a folder per iteration, in it a file per tensor-parallel rank and pipeline stage.

Source: MindSpeed-MM checkpoint converters, Megatron-LM megatron/training/checkpointing.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from cvx_core import FormatError
from cvx_core.interfaces import TensorInfo, Tensors
from cvx_io.atomic import atomic_file, atomic_folder, read_word
from cvx_io.layout import Grid, Part, Rank, assemble, split, split_info, stages_of
from cvx_io.lora import is_lora
from cvx_io.pieces import pieces
from cvx_io.regroup import listed
from cvx_io.rename import IDENTITY, Names, Split
from cvx_io.tensors.archive import Archive, torch_archive
from cvx_io.tensors.pickles import load_pickle
from cvx_io.tensors.stored import Reader, Stored
from cvx_io.tensors.unpickle import Inert
from cvx_plugins.formats import MegatronConfig

TRACKER = "latest_checkpointed_iteration.txt"
TRACKERS = (TRACKER, "latest_checkpointed_iterations.txt")
"""The name that code reads and writes, and one that only a guide has."""
LORA = "lora"
"""Where our own LoRA files state rank and alpha, which MindSpeed-MM has in `args`."""
WEIGHTS = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
_CHUNK = re.compile(r"model(\d*)")


class Megatron:
    """The `megatron` format, as MindSpeed-MM reads and writes it."""

    def __init__(self, cfg: MegatronConfig, extra: Mapping[str, Any] = MappingProxyType({})):
        self.cfg, self.extra = cfg, extra

    def accepts(self, path: Path) -> bool:
        """Tell whether `path` is a tree, an iteration in it, one of its files, or a merged file."""
        if path.is_dir():
            if not any((path / name).is_file() for name in TRACKERS) and not _files(path):
                return False
            return not is_lora(names_in(path))
        if path.suffix not in (".pt", ".pth") or not path.is_file():
            return False
        try:
            tree = load_pickle(path)
        except FormatError:
            return False
        if not isinstance(tree, Mapping) or {"module", "state_dict", "shard_state_dict"} & tree.keys():
            return False
        is_bare = bool(tree) and all(isinstance(value, Stored) for value in tree.values())
        return (is_bare or bool(_chunks(tree))) and not is_lora(names_in(path))

    def open(self, path: Path, names: Names | None = None) -> Tensors:
        """Return a checkpoint's weights whole; the facts hold what its `args` state, as plain values.

        Raises FormatError where files of the grid of ranks and stages are missing or contradict each other.
        """
        table = names or IDENTITY
        if path.is_file():
            content = _Content.of(path)
            grid: Grid = [[content.chunks[0]]]
            where, dropped, facts = str(path), content.dropped, content.facts
        else:
            folder = _iteration(path)
            contents = _contents(folder)
            grid, where = _grid(contents), str(folder)
            first = contents[0, 0]
            dropped, facts = first.dropped, first.facts
        whole = assemble(grid, table, where, self.cfg.replicas == "equal")
        source = Tensors(whole.index, whole.load, {**dropped, **whole.dropped}, facts=facts)
        found = table.read(source, where)
        if table.last and not any(name.startswith(tuple(table.last)) for name in whole.index):
            raise FormatError(
                f"{where}: holds none of {listed(list(table.last))}, with which the last stage ends. "
                "Copy the files of all stages."
            )
        return found

    def write(
        self,
        path: Path,
        tensors: Tensors,
        names: Names | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a tree, its tracker last, or a bare mapping where `path` ends in .pt.

        Raises FormatError where the tensors cannot be shared among so many ranks or stages.
        """
        plan = self._plan(path, tensors, names)
        if path.suffix == ".pt":
            with atomic_file(path) as partial, torch_archive(partial, plan.foreign.index) as archive:
                for name in plan.foreign.index:
                    archive.write(name, pieces(plan.foreign, name))
            return
        iteration = "release" if self.cfg.iteration is None else f"iter_{self.cfg.iteration:07}"
        with atomic_folder(path, manifest=TRACKER, stale=(f"{iteration}/*/{WEIGHTS}",)) as partial:
            for number, stage in enumerate(plan.stages):
                suffix = f"_{number:03}" if len(plan.stages) > 1 else ""
                files = [partial / iteration / f"mp_rank_{rank:02}{suffix}" for rank in range(self.cfg.tp)]
                self._write_stage(files, stage, plan)
            tracker = "release" if self.cfg.iteration is None else str(self.cfg.iteration)
            (partial / TRACKER).write_text(tracker, encoding="utf-8")

    def check(self, path: Path, tensors: Tensors, names: Names | None = None) -> None:
        """Raise FormatError where `write` would, before anything is read or written."""
        self._plan(path, tensors, names)

    def _plan(self, path: Path, tensors: Tensors, names: Names | None) -> _Plan:
        table = (names or IDENTITY).preferring(self.cfg.positions)
        if not table.blocks and self.cfg.pp != 1:
            raise FormatError(f"{path}: MindSpeed-MM runs this model in one stage. Leave out pp.")
        foreign = table.write(tensors, str(path))
        sizes = self.cfg.stages(_num_blocks(foreign, table))
        if path.suffix == ".pt" and (self.cfg.tp > 1 or len(sizes) * len(sizes[0]) > 1):
            raise FormatError(f"{path}: one file holds a whole model. Give a folder, or leave out tp and pp.")
        flat = stages_of(table, list(foreign.index), [size for chunk in sizes for size in chunk])
        rules = {name: table.split_of(name) for name in foreign.index}
        stages = []
        for number in range(len(sizes[0])):
            chunks = flat[number :: len(sizes[0])]
            wholes = {f"{v}/{local}": name for v, chunk in enumerate(chunks) for local, name in chunk.items()}
            index = {
                key: split_info(name, foreign.index[name], *rules[name], self.cfg.tp)
                for key, name in wholes.items()
            }
            stages.append(_Stage(wholes, index))
        return _Plan(foreign, rules, stages)

    def _write_stage(self, folders: Sequence[Path], stage: _Stage, plan: _Plan) -> None:
        """Write a stage's files for every tensor-parallel rank in one pass over its tensors."""
        with ExitStack() as stack:
            reader = stack.enter_context(Reader())
            archives: list[Archive] = []
            for folder in folders:
                folder.mkdir(parents=True)
                made = torch_archive(folder / WEIGHTS, stage.parts, self._wrap, reader)
                archives.append(stack.enter_context(made))
            for key, name in stage.wholes.items():
                whole = list(pieces(plan.foreign, name))
                for rank, archive in enumerate(archives):
                    archive.write(key, split(whole, *plan.rules[name], rank, len(archives)))

    def _wrap(self, state: Mapping[str, Any]) -> dict[str, Any]:
        chunks: dict[str, dict[str, Any]] = {}
        for key, value in state.items():
            number, _, name = key.partition("/")
            chunks.setdefault(number, {})[name] = value
        single = len(chunks) == 1
        content: dict[str, Any] = {("model" if single else f"model{n}"): held for n, held in chunks.items()}
        if not single or self.cfg.iteration is not None:
            content["checkpoint_version"] = 3.0
        if self.cfg.iteration is not None:
            content["iteration"] = self.cfg.iteration
        return {**content, **self.extra}


def megatron_format(cfg: MegatronConfig, _deps: Any) -> Megatron:
    """Build the format; it needs nothing else."""
    return Megatron(cfg)


def names_in(path: Path) -> list[str]:
    """Return the names in one file of a checkpoint, to tell its kind; none where it cannot be read."""
    try:
        file = path if path.is_file() else _files(_iteration(path))[0]
        return [name for chunk in _Content.of(file).chunks for name in chunk]
    except FormatError:
        return []


class _Stage(NamedTuple):
    """What the files of a stage hold. wholes: {chunk/name in it: whole name}; parts: shapes of a rank's."""

    wholes: Mapping[str, str]
    parts: Mapping[str, TensorInfo]


class _Plan(NamedTuple):
    """What is written: tensors under foreign names, how ranks share each, and the stages."""

    foreign: Tensors
    rules: Mapping[str, tuple[Split | None, int]]
    stages: Sequence[_Stage]


class _Content:
    """One file: the chunks of the model it holds, and what it states besides."""

    def __init__(self, chunks: list[Rank], dropped: dict[str, str], facts: dict[str, Any]):
        self.chunks, self.dropped, self.facts = chunks, dropped, facts

    @classmethod
    def of(cls, path: Path) -> _Content:
        tree = load_pickle(path)
        if not isinstance(tree, Mapping):
            raise FormatError(f"{path}: expected a mapping, got {type(tree).__name__}. Check the path.")
        models = _chunks(tree) or {"": tree}
        beside = [name for name in tree if models.keys() != {""} and name not in models]
        dropped = {str(name): "training state" for name in beside}
        chunks: list[Rank] = []
        for model in models.values():
            tensors = {str(name): value for name, value in model.items() if isinstance(value, Stored)}
            dropped |= {
                str(name): f"no tensor, but {type(value).__name__}"
                for name, value in model.items()
                if str(name) not in tensors
            }
            prefix = "predictor." if all(name.startswith("predictor.") for name in tensors) else ""
            chunks.append({name.removeprefix(prefix): Part(t.info, t.load) for name, t in tensors.items()})
        if not any(chunks):
            raise FormatError(f"{path}: holds no tensors under `model`. Check the path.")
        return cls(chunks, dropped, _facts(tree))


def _chunks(tree: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the model, or the chunks of a virtual pipeline in order, out of any converter's wrapping."""
    found = sorted((name for name in tree if _CHUNK.fullmatch(str(name))), key=lambda name: (len(name), name))
    models = {name: tree[name] for name in found or [name for name in ("ema_model",) if name in tree]}
    for name, model in models.items():
        if isinstance(model, list) and len(model) == 1:  # OpenSoraPlan's merge of one rank
            models[name] = model = model[0]
        if isinstance(model, Mapping) and isinstance(model.get("model"), Mapping):  # layerzero_to_mm
            models[name] = model["model"]
    return {name: model for name, model in models.items() if isinstance(model, Mapping)}


def _facts(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain values of `args`, and what our own LoRA files state in its place."""
    args, own = tree.get("args"), tree.get(LORA)
    stated = {**(vars(args) if isinstance(args, Inert) else {}), **(own if isinstance(own, Mapping) else {})}
    plain = (int, float, str, bool, type(None))
    return {"args": {str(name): value for name, value in stated.items() if isinstance(value, plain)}}


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob(f"mp_rank_*/{WEIGHTS}") if _RANK.fullmatch(file.parent.name))


def _iteration(path: Path) -> Path:
    """Return the folder with the ranks' folders."""
    if _files(path):
        return path
    trackers = [path / name for name in TRACKERS if (path / name).is_file()]
    if trackers:
        tracker, text = trackers[0], read_word(trackers[0])
        if other := [file for file in trackers if read_word(file) != text]:
            raise FormatError(
                f"{tracker}: holds {text!r}, but {other[0].name} holds {read_word(other[0])!r}. Remove one, "
                "or give the folder of an iteration."
            )
        if text != "release" and not re.fullmatch("[0-9]+", text):
            raise FormatError(f"{tracker}: holds {text!r}; expected `release` or the number of an iteration.")
        folder = path / ("release" if text == "release" else f"iter_{int(text):07}")
        if not _files(folder):
            raise FormatError(
                f"{folder}: {tracker.name} points here, but there is no mp_rank_*/{WEIGHTS}. Is it complete?"
            )
        return folder
    found = [folder for folder in sorted(path.glob("*")) if folder.is_dir() and _files(folder)]
    if len(found) != 1:
        what = ", ".join(folder.name for folder in found) or "no iteration"
        raise FormatError(f"{path}: has no {TRACKER} and holds {what}. Give the folder of one iteration.")
    return found[0]


def _contents(folder: Path) -> dict[tuple[int, int], _Content]:
    """Return every file by tensor-parallel rank and stage. Raises FormatError where the grid has holes."""
    files: dict[tuple[int, int], Path] = {}
    for file in _files(folder):
        match = _RANK.fullmatch(file.parent.name)
        assert match is not None
        at = int(match[1]), int(match[2] or 0)
        if at in files:
            raise FormatError(
                f"{folder}: {files[at].parent.name} and {file.parent.name} are the same rank and stage, of "
                "different saves. Remove one."
            )
        files[at] = file
    contents = {at: _Content.of(file) for at, file in files.items()}
    args = contents[min(contents)].facts.get("args", {})
    tp, pp = (
        max(1 + max(at[dim] for at in files), _count(args.get(f"{axis}_model_parallel_size")))
        for dim, axis in enumerate(("tensor", "pipeline"))
    )
    absent = ((r, s) for r in range(tp) for s in range(pp) if (r, s) not in files)
    if names := [f"mp_rank_{r:02}" + (f"_{s:03}" if pp > 1 else "") for r, s in islice(absent, 4)]:
        raise FormatError(
            f"{folder}: {tp * pp - len(files)} of {tp} x {pp} files (tensor-parallel ranks x stages) are "
            f"missing: {', '.join(names)}. Copy all of them."
        )
    if len({len(content.chunks) for content in contents.values()}) > 1:
        raise FormatError(
            f"{folder}: files hold different numbers of virtual chunks. Get all of them from one save."
        )
    return contents


def _count(value: Any) -> int:
    """Return the number of ranks that a file states, 1 where it states none."""
    return value if type(value) is int and value > 0 else 1


def _grid(contents: Mapping[tuple[int, int], _Content]) -> Grid:
    """Order chunks as the model runs: all stages of the first virtual chunk, then those of the next."""
    tp, pp = (1 + max(at[dim] for at in contents) for dim in (0, 1))
    virtual = len(contents[0, 0].chunks)
    return [
        [contents[rank, stage].chunks[v] for rank in range(tp)] for v in range(virtual) for stage in range(pp)
    ]


def _num_blocks(foreign: Tensors, table: Names) -> int:
    start = len(table.blocks)
    numbers = {name[start:].partition(".")[0] for name in foreign.index if name.startswith(table.blocks)}
    return len(numbers) if table.blocks else 0
