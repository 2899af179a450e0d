"""Configs of zero1 and layerzero: optimizer state shared out over all ranks that hold the same. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, model_validator

from cvx_core import Component
from cvx_core.config import Positive
from cvx_core.degrees import Degrees
from cvx_core.errors import Problem, did_you_mean
from cvx_core.interfaces import Deps
from cvx_core.strategy import Stage, StrategyConfig

if TYPE_CHECKING:
    from cvx_core.spec import Spec

SPELLINGS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""MindSpeed's names of precisions."""
Spelled = Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]
Precision = Annotated[
    Literal["float32", "bfloat16", "float16"],
    BeforeValidator(lambda value: SPELLINGS.get(value, value), json_schema_input_type=Spelled),
]
GROUP = 8
"""Ranks of a group, where a recipe does not say and there are as many."""
MODELS = {"ae": "autoencoder", "autoencoder": "autoencoder", "text_encoder": "text_encoder"}
"""{what MindSpeed-MM's ignored_modules call a model: its section}"""


def _names(value: Any) -> Any:
    """Return null as no names; a list is a tuple, as pydantic is strict about what comes from here."""
    return tuple(value or ()) if value is None or isinstance(value, list) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_names, json_schema_input_type=Sequence[str] | None)]


def _allowed(value: Any) -> Any:
    if value is not True:
        raise ValueError(
            "no more blocks are gathered ahead than forward_prefetch and backward_prefetch say: one. "
            "Leave it out, or set true."
        )
    return value


class Zero1Config(StrategyConfig):
    """Data parallel with parameters and gradients on every rank, and the optimizer's state shared out."""

    stage: ClassVar[Stage] = Stage.SHARD
    fields: ClassVar[Mapping[str, tuple[str, ...]]] = {"size": ("dp_replicate",)}

    size: Positive | Literal["auto"] = "auto"
    """Ranks that read different rows; auto takes what the other strategies leave."""

    def degrees(self) -> Mapping[str, int | None]:
        return {"dp_shard": 1, "dp_replicate": None if self.size == "auto" else self.size}

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield why there is no optimizer state."""
        yield from needs_training(spec, "optimizer state")


class LayerZeroConfig(StrategyConfig):
    """Data parallel with parameters shared out inside groups, the optimizer's state over all data ranks."""

    stage: ClassVar[Stage] = Stage.SHARD
    fields: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "zero3_size": ("dp_shard",),
        "size": ("dp_replicate", "dp_shard"),
    }
    usual: ClassVar[Mapping[str, int]] = {"dp_shard": GROUP}
    also_called: ClassVar[Mapping[str, str]] = {"hsdp": "`{use: layerzero, zero3_size: 8}`"}
    foreign: ClassVar[Mapping[str, str]] = {
        "transformer_layers": "blocks are those that the predictor's plan names. Leave it out.",
        "backward_reduce_scatter": "the gradients of a block are sent as soon as they are there. Leave it "
        "out.",
        "buffer_dtype": "models of cvx keep no buffers; tables are computed in the precision of what they "
        "are used with. Leave it out.",
        "param_init_fn": "parameters without weights are drawn from `seed`. Leave it out.",
        "offload_grads": "gradients stay on the device, where they are shared out. Leave it out; cp, and "
        "recompute with offload: true, save memory elsewhere.",
        "ckpt_load_path": "a run goes on from its own checkpoint by `task.resume`, and starts from "
        "MindSpeed's by `weights: {use: layerzero, path: ...}` of the predictor.",
        "autocast_input": "a predictor takes its inputs in the precision that it computes in. Leave it out.",
        "autocast_output": "the loss is computed in float32 whatever the predictor returns. Leave it out.",
    }

    size: Positive | Literal["auto"] = "auto"
    """Ranks that read different rows, in all groups; auto takes what the other strategies leave."""
    zero3_size: Positive | None = None
    """Data ranks of a group, which share parameters and gather them among themselves only. It divides size.
    null: 8, or all data ranks where they are fewer. With cp, the ranks that share a sequence share parameters
    too, so that a group is that many times larger.
    """
    param_dtype: Precision | None = None
    """Precision in which blocks are gathered and computed, also as bf16 or fp32; null: that of the recipe.
    With float32 in the recipe and bfloat16 here, what is kept and updated is float32.
    """
    reduce_dtype: Precision | None = None
    """Precision in which gradients are summed; null: that in which they were computed."""
    forward_prefetch: bool = True
    """Gather the next block while one is computed."""
    backward_prefetch: Literal["BACKWARD_PRE", "BACKWARD_POST"] = "BACKWARD_PRE"
    """When the next block is gathered in the backward pass: BACKWARD_PRE while one is computed, which is
    faster, or BACKWARD_POST after it, so that never two are there."""
    limit_all_gathers: Annotated[bool, BeforeValidator(_allowed)] = True
    """Gather no block before it is one's turn, as is always so; there is no false."""
    ignored_modules: Names = ()
    """Modules, by name, whose parameters every rank keeps whole; each must exist."""

    @model_validator(mode="after")
    def _whole_groups(self) -> LayerZeroConfig:
        if self.size != "auto" and self.size % self._group:
            stated = "" if self.zero3_size is not None else ", which it is where it is not stated,"
            raise ValueError(
                f"zero3_size {self._group}{stated} does not divide size {self.size}; "
                f"{_nearest_divisor(self.size, self._group)} would."
            )
        return self

    @property
    def _group(self) -> int:
        """Ranks of a group; with `size: auto`, there may be fewer in all."""
        return self.zero3_size or (GROUP if self.size == "auto" else min(GROUP, self.size))

    def degrees(self) -> Mapping[str, int | None]:
        groups = None if self.size == "auto" else self.size // self._group
        return {"dp_shard": self._group, "dp_replicate": groups}

    def notes(self, spec: Spec, mesh: Degrees | None) -> Iterable[str]:
        """Yield what zero3_size is where it is neither stated nor the usual."""
        if mesh is not None and self.zero3_size is None and mesh.size("dp_shard") < GROUP:
            yield (
                f"layerzero: zero3_size {mesh.size('dp_shard')}, which is all data ranks; with more of them "
                f"it is {GROUP}"
            )

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield why there is no optimizer state, precisions that lose gradients, and unknown modules."""
        problems = list(needs_training(spec, "optimizer state"))
        yield from problems
        for field in ("param_dtype", "reduce_dtype") if not problems else ():
            if getattr(self, field) == "float16":
                yield Problem(
                    field,
                    "is float16, in which small gradients vanish: losses are not scaled against that. Use "
                    "bfloat16 or float32.",
                )
        if self.ignored_modules and not problems:
            yield from self._unknown(spec, spec.config("task").trains)

    def _unknown(self, spec: Spec, section: str) -> Iterable[Problem]:
        if section not in spec.choices:
            return
        import torch  # only a model knows its modules

        with torch.device("meta"):
            module = spec.choices[section].build(Deps(spec))
        known = [
            name
            for name, part in module.named_modules()
            if name and next(part.parameters(), None) is not None
        ]
        for number, name in enumerate(self.ignored_modules):
            if name in MODELS and MODELS[name] != section:
                yield Problem(
                    f"ignored_modules.{number}",
                    f"{name!r} is a model of its own here, which every rank keeps whole; only the {section} "
                    "is shared out. Leave it out.",
                )
            elif name not in known:
                yield Problem(
                    f"ignored_modules.{number}",
                    f"{section} {spec.name_of(section)!r} has no module {name!r} with parameters."
                    f"{did_you_mean(name, known)} Name one, or leave it out.",
                )


def _nearest_divisor(number: int, wish: int) -> int:
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: abs(n - wish))


def needs_training(spec: Spec, what: str) -> Iterable[Problem]:
    """Yield why there is nothing to share out. what: such as "gradients"."""
    if spec.config("task") is not None and spec.config("task").trains is None:
        yield Problem(
            "",
            f"task {spec.name_of('task')!r} trains nothing, so it has no {what} to share out. "
            "Use zero3 to share parameters.",
        )


def components() -> Iterable[Component]:
    """Yield the strategies."""
    target = "cvx_plugins.parallel.layerzero:"
    yield Component(
        "strategy",
        "zero1",
        Zero1Config,
        f"{target}Zero1",
        summary="optimizer state sharded, all else replicated",
    )
    yield Component(
        "strategy",
        "layerzero",
        LayerZeroConfig,
        f"{target}LayerZero",
        summary="parameters sharded inside groups of zero3_size, optimizer state over all data ranks",
    )
