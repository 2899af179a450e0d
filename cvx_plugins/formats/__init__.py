"""Built-in formats: how weights lie on disk. Implementations import their libraries when built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from cvx_core import Component, Config, FormatError, Plan, hookimpl
from cvx_core.config import InputPath, Positive
from cvx_core.registry import Registry
from cvx_plugins.formats import pipeline


class HFConfig(Config):
    """A folder with config.json and safetensors (whole or in shards), or one .safetensors file."""

    holds_models: ClassVar[bool] = True
    keeps_config: ClassVar[bool] = True
    needs_config: ClassVar[bool] = True
    to_write: ClassVar[tuple[str, ...]] = ("shard_limit",)
    files: ClassVar[tuple[str, ...]] = (".safetensors",)
    lora_format: ClassVar[str] = "diffusers-lora"

    canonical: ClassVar[bool] = True  # names in the files are ours, unless a names table says otherwise

    path: InputPath | None = None
    """The folder, the index file of the shards, or the file. Needed to read."""
    shard_limit: Positive = 5_000_000_000
    """Most bytes of tensors in one file when a folder is written."""

    @classmethod
    def sections(cls, path: Path, registry: Registry) -> tuple[Mapping[str, Any], list[str]] | None:
        """Return the recipe sections and notes `model: path` stands for; None if it is no such folder.

        Raises FormatError on a part of the folder that no installed component recognises.
        """
        return pipeline.sections(path, registry)


class DCPConfig(Config):
    """A torch distributed checkpoint: a folder with .metadata and .distcp files, of FSDP or of a run here."""

    to_read: ClassVar[tuple[str, ...]] = ("part",)
    files: ClassVar[tuple[str, ...]] = ()
    keeps_config: ClassVar[bool] = True

    canonical: ClassVar[bool] = True  # names in the files are ours, unless a names table says otherwise

    path: InputPath | None = None
    """The folder of one step. Needed to read."""
    part: str | None = None
    """Read only names under this prefix, such as `model`, and strip it. Without it: `model` where the
    checkpoint holds a training state, else everything."""


class SATConfig(Config):
    """A SAT transformer folder with `latest`, or one .pt file, as CogVideo's original code has them."""

    lora_format: ClassVar[str] = "sat-lora"
    to_read: ClassVar[tuple[str, ...]] = ("lora",)
    files: ClassVar[tuple[str, ...]] = (".pt",)

    path: InputPath | None = None
    """The folder or the file. Needed to read."""
    tag: str | None = None
    """The save to read or write, such as `500` or `500-ema`. None: read what `latest` names, write `1`."""
    lora: Literal["refuse", "drop"] = "refuse"
    """What to do, when reading, with LoRA matrices in a file."""

    @field_validator("tag", mode="before")
    @classmethod
    def _is_a_name(cls, tag: Any) -> Any:
        """Take 500 for "500", as options on the command line are."""
        name = str(tag) if type(tag) is int else tag
        if isinstance(name, str) and (Path(name).name != name or name in ("", "..")):
            raise ValueError("expected the plain name of a folder, such as 500 or 500-ema")
        return name


Sizes = Annotated[tuple[Positive, ...], Field(min_length=1)]


class MegatronConfig(Config):
    """A Megatron tree of MindSpeed-MM, split over tensor-parallel ranks and pipeline stages."""

    lora_format: ClassVar[str] = "megatron-lora"
    to_read: ClassVar[tuple[str, ...]] = ("replicas",)
    to_write: ClassVar[tuple[str, ...]] = ("tp", "pp", "iteration", "positions")
    files: ClassVar[tuple[str, ...]] = (".pt",)

    path: InputPath | None = None
    """The folder with the tracker, the folder of an iteration, or a merged file. Needed to read."""
    tp: Positive = 1
    """Tensor-parallel ranks to write for."""
    pp: Positive | Sizes | Annotated[tuple[Sizes, ...], Field(min_length=1)] = 1
    """Pipeline stages to write: their number, the layers of each, or a list of such lists, one for each chunk
    of a virtual pipeline."""
    iteration: Positive | None = None
    """The iteration to write as; None: `release`."""
    positions: Literal["pos_embed", "rope"] = "pos_embed"
    """Where learned positions are written: as converters call them, or as MindSpeed-MM since 2.0.0 does."""
    replicas: Literal["equal", "first"] = "equal"
    """Reading tensors that every rank holds: insist that the copies are equal, or take the first."""

    def stages(self, layers: int) -> tuple[tuple[int, ...], ...]:
        """Return the layers of each stage, by virtual chunk. Raises FormatError where they do not fit."""
        if isinstance(self.pp, int):
            if self.pp > max(layers, 1):
                raise FormatError(
                    f"pp={self.pp} is more than the model's {layers} layers. Choose fewer stages."
                )
            if layers % self.pp:
                raise FormatError(
                    f"pp={self.pp} does not divide {layers} layers. Give the layers of each stage, such as "
                    f"pp={even(layers, self.pp)}."
                )
            return ((layers // self.pp,) * self.pp,)
        chunks = tuple(chunk for chunk in self.pp if isinstance(chunk, tuple))
        if len({len(chunk) for chunk in chunks}) > 1:
            raise FormatError(f"pp={self.pp}: every virtual chunk needs the same number of stages.")
        return chunks or (tuple(size for size in self.pp if isinstance(size, int)),)

    def unfit(self, plan: Plan) -> str | None:
        """Return why a model cannot be split in this way, None where it can."""
        if plan.num_heads % self.tp:
            legal = [n for n in range(1, plan.num_heads + 1) if plan.num_heads % n == 0]
            return f"tp={self.tp} does not divide the model's {plan.num_heads} heads. Choose one of {legal}."
        return None


class SATLoraConfig(SATConfig):
    """The LoRA matrices in a SAT checkpoint, whatever else it holds."""

    holds: ClassVar[str] = "lora"


class MegatronLoraConfig(MegatronConfig):
    """A LoRA checkpoint of MindSpeed-MM."""

    holds: ClassVar[str] = "lora"


class LayerZeroConfig(Config):
    """Shards that MindSpeed's LayerZero training saves, one file per rank. Read only."""

    read_only: ClassVar[bool] = True

    path: InputPath | None = None
    """The folder of an iteration. Needed to read."""
    weights: Literal["model", "ema_model"] = "model"
    """Which weights to read: the trained ones, or their moving average."""


def even(layers: int, stages: int) -> list[int]:
    """Return stage sizes that differ by one at most, the larger in the middle: the ends hold more besides."""
    sizes = [layers // stages] * stages
    middle = sorted(range(stages), key=lambda stage: abs(2 * stage - stages + 1))
    for stage in middle[: layers % stages]:
        sizes[stage] += 1
    return sizes


@hookimpl
def cvx_components() -> Iterable[Component]:
    yield Component(
        "format",
        "hf",
        HFConfig,
        "cvx_plugins.formats.hf:hf_format",
        summary="Hugging Face folders: config.json with safetensors, canonical names",
    )
    yield Component(
        "format",
        "sat",
        SATConfig,
        "cvx_plugins.formats.sat:sat_format",
        summary="CogVideo's original checkpoints: transformer/latest, 3d-vae.pt",
    )
    yield Component(
        "format",
        "megatron",
        MegatronConfig,
        "cvx_plugins.formats.megatron:megatron_format",
        summary="MindSpeed-MM trees: mp_rank folders, tp and pp",
    )
    yield Component(
        "format",
        "sat-lora",
        SATLoraConfig,
        "cvx_plugins.formats.sat:sat_lora_format",
        summary="LoRA matrices of a SAT fine-tune",
    )
    yield Component(
        "format",
        "megatron-lora",
        MegatronLoraConfig,
        "cvx_plugins.formats.megatron_lora:megatron_lora_format",
        summary="LoRA checkpoints of MindSpeed-MM",
    )
    yield Component(
        "format",
        "layerzero",
        LayerZeroConfig,
        "cvx_plugins.formats.layerzero:layerzero_format",
        summary="MindSpeed LayerZero shards: one file per rank, read only",
    )
    yield Component(
        "format",
        "dcp",
        DCPConfig,
        "cvx_plugins.formats.dcp:dcp_format",
        summary="Torch distributed checkpoints: .metadata with .distcp files, canonical names",
    )
