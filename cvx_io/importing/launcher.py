"""On how many devices a program is started: accelerate, torchrun, msrun, deepspeed, or python alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cvx_core.errors import FormatError
from cvx_io.importing.draft import Draft, whole
from cvx_io.importing.shell import Command, Script, find_file

COUNTS: Mapping[str, tuple[str, ...]] = {
    "accelerate": ("--num_processes",),
    "torchrun": ("--nproc_per_node", "--nnodes"),
    "msrun": ("--worker_num",),
    "deepspeed": ("--num_gpus", "--num_nodes"),
}
"""Flags whose product is the number of devices; the second is 1 where it is not given."""
STARTING = ("--gpu_ids", *(name for names in COUNTS.values() for name in names))
VISIBLE = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
STRATEGIES = {"NO": "ddp", "MULTI_GPU": "ddp", "MULTI_NPU": "ddp", "DEEPSPEED": "zero2", "FSDP": "zero3"}
STAGES = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}
_OPEN = {
    "dir", "path", "root", "folder", "file", "prompt", "prompts", "images", "name", "save", "load", "data",
    "model", "tool", "config", "column", "token", "project", "id", "separator",
}  # fmt: skip
"""Words in the names of flags whose values are paths or texts."""
SHARDING = {
    "FULL_SHARD": "zero3",
    "SHARD_GRAD_OP": "zero2",
    "NO_SHARD": "ddp",
    "1": "zero3",
    "2": "zero2",
    "3": "ddp",
}


@dataclass
class Launch:
    """How a program is started. kind: of COUNTS, or python; flags: the launcher's own; config: what
    accelerate's file says, empty where it is not at hand.
    """

    kind: str
    flags: dict[str, Any]
    source: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def devices(self, draft: Draft) -> int:
        """Return how many processes there are, and say so. Raises FormatError where nothing tells."""
        count, how = self._count()
        if how:
            text = f"{count} devices" if count != 1 else "1 device"
            start = f"start it with torchrun --nproc-per-node {count} -m cvx_core.run RECIPE"
            draft.note("mapped", how, text, start if count != 1 else "one process")
        return count

    def leave(self, draft: Draft) -> None:
        """Say that what is left is the launcher's own."""
        for name, value in self.flags.items():
            draft.note("no counterpart", f"{self.kind} {name}", value, "is the launcher's own")
        self.flags = {}

    def strategy(self) -> str:
        """Return the data strategy that accelerate is told; ddp with the other launchers."""
        config = str(self.flags.get("--config_file", ""))
        kind = str(self.config.get("distributed_type", "")).upper()
        if not self.config:
            kind = "DEEPSPEED" if "deepspeed" in config else "FSDP" if "fsdp" in config else "NO"
        if self.flags.get("--use_deepspeed"):
            kind = "DEEPSPEED"
        if self.flags.get("--use_fsdp"):
            kind = "FSDP"
        inner = self.config.get("deepspeed_config") or self.config.get("fsdp_config") or {}
        stage = self.flags.get("--zero_stage", inner.get("zero_stage"))
        if kind == "DEEPSPEED" and stage is not None:
            return STAGES.get(whole(stage), "zero2")
        if kind == "FSDP":
            sharding = self.flags.get("--fsdp_sharding_strategy", inner.get("fsdp_sharding_strategy"))
            return SHARDING.get(str(sharding).upper(), "zero3")
        return STRATEGIES.get(kind, "ddp")

    def _count(self) -> tuple[int, str]:
        if self.kind == "python":
            return 1, ""
        first, *others = COUNTS[self.kind]
        if self.kind == "torchrun":
            self.flags.setdefault(first, 1)
        value, how = self._first(first)
        names = [how]
        for name in others:
            if name in self.flags:
                value *= self._whole(name, self.flags.pop(name))
                names.append(f"{self.kind} {name}")
        return value, ", ".join(names)

    def _first(self, name: str) -> tuple[int, str]:
        """Return what the flag says, or what stands in for it."""
        ids, config = self.flags.pop("--gpu_ids", None), self.flags.get("--config_file")
        beside = f", {self.kind} --gpu_ids {ids}" if ids is not None else ""
        if name in self.flags:
            return self._whole(name, self.flags.pop(name)), f"{self.kind} {name}{beside}"
        if "num_processes" in self.config:
            count = self._whole("num_processes", self.config["num_processes"])
            return count, f"num_processes of {config}{beside}"
        if ids is not None and str(ids).lower() != "all" and "$" not in str(ids):
            return len(str(ids).split(",")), beside.removeprefix(", ")
        for variable in VISIBLE:
            if self.kind == "accelerate" and (given := self.environment.get(variable)) and "$" not in given:
                return len(given.split(",")), f"{variable}={given}"
        given = "--gpu_ids all" if ids is not None else f"no {name}"
        at_hand = f", and {config} is not at hand. Put it there" if config else ". Add it"
        raise FormatError(
            f"{self.source}: {self.kind} is given {given}, which does not say how many devices "
            f"there are{at_hand}, or state --also {name.removeprefix('--')}=N."
        )

    def _whole(self, name: str, value: Any) -> int:
        try:
            return whole(value)
        except (TypeError, ValueError):
            raise FormatError(
                f"{self.source}: {self.kind} {name} is {value!r}, which is no number of devices. State "
                f"--also {name.removeprefix('--')}=N."
            ) from None


def check_unknown(command: Command, script: Script, source: str, stated: set[str], place: int) -> list[str]:
    """Return what to say of words that hold what only a shell could know: in a path or a text they stay.

    stated: flags that are given otherwise; place: of the program's name. Raises FormatError for other flags.
    """
    notes, flag = [], ""
    for number, word in enumerate(command.words):
        if word.startswith("--"):
            flag, is_value = word.partition("=")[0], "=" in word
        else:
            is_value = number > 0 and command.words[number - 1] == flag
        if number not in command.unknown or (flag in stated and is_value):
            continue
        for name in re.findall(r"\$\{?(\w+)", word):
            if name in script.undecided:
                raise FormatError(
                    f"{source}: {name} depends on {script.undecided[name]}, which is not known from the "
                    f"text. Set {name} without a condition, in a copy of the script."
                )
        if number <= place or (is_value and _OPEN & set(re.split(r"[-_]+", flag))):
            notes.append(f"{word}: is set nowhere in the script; replace it")
        elif is_value:
            raise FormatError(
                f"{source}: {flag} is {word}, which is not known from the text. State "
                f"--also {flag.removeprefix('--')}=VALUE."
            )
        else:
            raise FormatError(
                f"{source}: {word} stands among the flags, and what it is is not known from the text. Set it "
                "in a copy of the script, to nothing if it is nothing."
            )
    return notes


def launch_of(command: Command, flags: dict[str, Any], script: Path, source: str) -> Launch:
    """Return how a command starts its program. flags: those before the program's name."""
    joined = " ".join(command.words)
    kind = Path(command.words[0]).name.replace("python3", "python")
    if "torch.distributed" in joined:
        kind = "torchrun"
    if "accelerate.commands.launch" in joined:
        kind = "accelerate"
    if kind == "torchrun":
        flags = {f"--{name.removeprefix('--').replace('-', '_')}": value for name, value in flags.items()}
    launch = Launch(kind, flags, source, command.environment)
    config = flags.get("--config_file")
    if kind == "accelerate" and isinstance(config, str):
        launch.config = _config(config, script)
    return launch


def _config(name: str, script: Path) -> dict[str, Any]:
    """Return what accelerate's file says, nothing where it is not at hand. Raises FormatError."""
    try:
        path = find_file(name, script)
    except FormatError:
        return {}
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FormatError(f"{path}: cannot be read as YAML: {error}. Correct it.") from error
    if not isinstance(data, dict):
        raise FormatError(f"{path}: is no config of accelerate, which is a mapping. Correct it.")
    return data
