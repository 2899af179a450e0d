"""pp: the predictor's blocks on consecutive ranks. The mechanism is in cvx_parallel.pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cvx_core.errors import CvxError, PluginError
from cvx_core.interfaces import Condition, Deps, Features, Noised, Parts, Plan, Tokens
from cvx_core.random import Draws
from cvx_parallel.pipeline import Cut, Passing, actions
from cvx_plugins.parallel.pp_config import PipelineConfig


class Pipeline:
    """Every rank has the blocks of its stages; the first embeds, the last computes the loss."""

    def __init__(self, cfg: PipelineConfig, plan: Plan):
        self.cfg, self.plan = cfg, plan
        self._cut: Cut | None = None

    def apply(self, parts: Parts) -> Parts:
        """Leave this rank's share of the predictor, whose `forward` is then that of a stage."""
        if parts.mesh.size("pp") == 1:
            return parts
        module = parts.predictor
        if not hasattr(module, "outline") or not self.plan.head:
            raise PluginError(
                f"pp: {type(module).__name__} cannot be cut: it has no `outline`, or its plan names no "
                "modules of its `head`. Use zero3, tp or cp with it."
            )
        names = list(module.blocks)
        stages = tuple(tuple(names[first:end]) for first, end in self.cfg.bounds(len(names)))
        counts = [len(stage) for stage in stages]
        if sum(counts) != len(names) or not all(counts):
            raise CvxError(
                f"pp: {len(names)} blocks do not make stages of {self.cfg.counts(len(names))}. "
                "Change `stages`."
            )
        self._cut = Cut(stages, self.cfg.ranks)
        whole = {name: tuple(p.shape) for name, p in module.named_parameters()}
        keep(module, self.plan, self._cut, parts.mesh.place("pp"))
        here = {name for name, _ in module.named_parameters()}
        module.forward = StageForward(module, self._cut)
        return replace(parts, elsewhere={name: shape for name, shape in whole.items() if name not in here})

    def finish(self, parts: Parts) -> Parts:
        """Put the step of all stages in place of the predictor's."""
        if self._cut is None:
            return parts
        step = PipelineStep(parts, self.cfg, self._cut)
        return replace(parts, forward_backward=step, before_update=step.before_update)


def keep(module: Any, plan: Plan, cut: Cut, rank: int) -> None:
    """Remove the blocks and the parameters that other ranks have; what remains keeps its names."""
    mine = {name for stage in cut.of(rank) for name in cut.stages[stage]}
    for name in list(module.blocks):
        if name not in mine:
            del module.blocks[name]
    first, last = 0 in cut.of(rank), cut.last in cut.of(rank)
    for name, part in module.named_modules():
        if name.startswith(f"{plan.blocks}."):
            continue
        of_head = any(name == head or name.startswith(f"{head}.") for head in plan.head)
        if not (last if of_head else first):
            for parameter in list(dict(part.named_parameters(recurse=False))):
                part.register_parameter(parameter, None)


class StageForward:
    """What a cut predictor computes when it is called: one stage, from what came before to what comes after.

    It stands for `forward`, so that whatever others do around a call of the predictor happens around stages.
    """

    def __init__(self, module: Any, cut: Cut):
        self._module, self._cut = module, cut

    def __call__(self, stage: int, given: Noised, tokens: Tokens | None) -> Tokens | Tensor:
        """Return tokens, or the prediction (B,C,T,h,w) of the last stage. tokens: None for the first."""
        module = self._module
        if tokens is None:
            tokens = module.split(module.embed(given.noisy, given.timestep, given.condition))
        for name in self._cut.stages[stage]:
            tokens = module.blocks[name](tokens)
        return module.head(module.join(tokens)) if stage == self._cut.last else tokens


class PipelineStep:
    """`forward_backward` of all stages together, and `before_update` for it."""

    def __init__(self, parts: Parts, cfg: PipelineConfig, cut: Cut):
        group = parts.mesh.group("pp")
        assert group is not None
        self._parts, self._cfg, self._cut, self._group = parts, cfg, cut, group
        self._inner = parts.before_update
        self._is_last = True

    def before_update(self, is_last: bool) -> None:
        """Note whether the next batch is the last of a step."""
        self._is_last = is_last

    def __call__(self, features: Features, draws: Draws) -> Tensor:
        """Leave gradients of this rank's stages; return the loss, on every rank. Collective over `pp`."""
        parts, objective = self._parts, self._parts.objective
        assert objective is not None
        dtype = next(parts.predictor.parameters()).dtype
        given = objective.noised(features, draws, dtype)
        count = self._cfg.parts(len(given.noisy))
        stages = Microbatches(parts.predictor, self._cut, divided(given, count), objective)
        passing = Passing(stages, self._group, self._cut, parts.device, self._before)
        orders = actions(self._cfg.schedule, self._cut.ranks, len(self._cut.stages), count)
        loss = passing.run(orders[parts.mesh.place("pp")])
        if loss is None:
            wide = torch.promote_types(dtype, torch.float32)
            loss = torch.zeros((), dtype=wide, device=parts.device)
        source = dist.get_process_group_ranks(self._group)[self._cut.rank_of(self._cut.last)]
        dist.broadcast(loss, source, group=self._group)
        return loss * objective.accumulate

    def _before(self, is_last: bool) -> None:
        self._inner(is_last and self._is_last)


class Microbatches:
    """The stages of this rank on the microbatches of one batch; see cvx_parallel.pipeline.Stages."""

    def __init__(self, module: nn.Module, cut: Cut, given: Sequence[Noised], objective: Any):
        self.module: Any = module
        self._cut, self._given, self._objective = cut, given, objective
        self._rows = sum(len(part.noisy) for part in given)
        self._outlines: dict[tuple[int, int], Tokens] = {}

    @torch.no_grad()
    def expects(self, stage: int, microbatch: int) -> Sequence[Tensor]:
        """Return tokens as they leave `split`, without values."""
        given = self._given[microbatch]
        tokens = self.module.split(self.module.outline(given.noisy, given.condition))
        self._outlines[stage, microbatch] = tokens
        return tokens.video, tokens.text, tokens.temb

    def forward(self, stage: int, microbatch: int, arrived: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return video, text and temb; of the last stage its rows' share of the mean loss."""
        given, tokens = self._given[microbatch], None
        if arrived:
            video, text, temb = arrived
            tokens = self._outlines.pop((stage, microbatch))._replace(video=video, text=text, temb=temb)
        result = self.module(stage, given, tokens)
        if stage == self._cut.last:
            error = self._objective.error(result, given.target)
            return [error.sum() / (self._rows * self._objective.accumulate)]
        dtype = given.noisy.dtype  # with mixed precision a stage may compute in another one
        return [result.video.to(dtype), result.text.to(dtype), result.temb.to(dtype)]

    def parameters(self, stage: int) -> Sequence[Tensor]:
        """Return the parameters of a stage: its blocks' and, at either end, those outside the blocks."""
        module = self.module
        inside = [p for name in self._cut.stages[stage] for p in module.blocks[name].parameters()]
        if stage not in (0, self._cut.last):
            return inside
        blocks = {id(p) for p in module.blocks.parameters()}
        return [*inside, *(p for p in module.parameters() if id(p) not in blocks)]


def divided(given: Noised, count: int) -> list[Noised]:
    """Divide the rows of a batch into microbatches, the first ones longer where they do not divide."""
    cut: Callable[[Tensor], Sequence[Tensor]] = lambda tensor: tensor.tensor_split(count)  # noqa: E731
    text, mask, image = given.condition
    images = cut(image) if image is not None else [None] * count
    conditions = [Condition(*part) for part in zip(cut(text), cut(mask), images, strict=True)]
    return [
        Noised(*part)
        for part in zip(cut(given.noisy), cut(given.timestep), conditions, cut(given.target), strict=True)
    ]


def build(cfg: PipelineConfig, deps: Deps) -> Pipeline:
    """Build the strategy."""
    assert deps.spec is not None
    return Pipeline(cfg, deps.spec.config("predictor").plan())
