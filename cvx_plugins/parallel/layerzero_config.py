"""Configs of zero1 and layerzero: optimizer state shared out over all ranks that hold the same. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from cvx_core import Component
from cvx_core.config import Positive
from cvx_core.errors import Problem, did_you_mean
from cvx_core.interfaces import Deps
from cvx_core.strategy import Stage, StrategyConfig

if TYPE_CHECKING:
    from cvx_core.spec import Spec

Precision = Literal["float32", "bfloat16"]


class Zero1Config(StrategyConfig):
    """Data parallel with parameters and gradients on every rank, and the optimizer's state shared out."""

    stage: ClassVar[Stage] = Stage.SHARD

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

    size: Positive | Literal["auto"] = "auto"
    """Ranks that read different rows, in all groups; auto takes what the other strategies leave."""
    zero3_size: Positive = 8
    """Data ranks of a group, which share parameters and gather them among themselves only. It divides size.
    With cp, the ranks that share a sequence share parameters too, so that a group is that many times larger.
    """
    param_dtype: Precision | None = None
    """Precision in which blocks are gathered and computed; null: that of the recipe. With float32 in the
    recipe and bfloat16 here, what is kept and updated is float32.
    """
    reduce_dtype: Precision | None = None
    """Precision in which gradients are summed; null: that in which they were computed."""
    forward_prefetch: bool = True
    """Gather the next block while one is computed."""
    ignored_modules: tuple[str, ...] = ()
    """Modules, by name, whose parameters every rank keeps whole; each must exist."""

    @model_validator(mode="after")
    def _whole_groups(self) -> LayerZeroConfig:
        if self.size != "auto" and self.size % self.zero3_size:
            raise ValueError(
                f"zero3_size {self.zero3_size} does not divide size {self.size}; "
                f"{_nearest_divisor(self.size, self.zero3_size)} would."
            )
        return self

    def degrees(self) -> Mapping[str, int | None]:
        groups = None if self.size == "auto" else self.size // self.zero3_size
        return {"dp_shard": self.zero3_size, "dp_replicate": groups}

    def check(self, spec: Spec) -> Iterable[Problem]:
        """Yield why there is no optimizer state, and modules that do not exist."""
        problems = list(needs_training(spec, "optimizer state"))
        yield from problems
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
            if name not in known:
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
