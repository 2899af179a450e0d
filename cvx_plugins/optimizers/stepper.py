"""An optimizer that takes one parameter after the other: the precision of weights, and where state lies.

What an update is, is a rule's business. It sees what this rank holds, as plain tensors, at least in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cvx_core import CvxError
from cvx_core.interfaces import ParamGroup
from cvx_parallel.gradients import local
from cvx_parallel.optimizer_state import laid_out, load_exactly
from cvx_plugins.optimizers.host_gradients import HostGradients
from cvx_plugins.optimizers.rounding import stochastic
from cvx_plugins.optimizers.shared_config import OptimizerConfig
from cvx_plugins.optimizers.splitting import split

State = dict[str, Tensor]
MASTER = "master"


class Rule(Protocol):
    """How an optimizer changes one parameter. Tensors of its state are changed in place."""

    group: Mapping[str, Any]
    """What a parameter group holds besides lr and weight_decay."""
    parted: bool
    """Whether parts of parameters do."""

    def start(self, name: str, weight: Tensor) -> State:
        """Return the state before the first step."""
        ...

    def update(
        self, weight: Tensor, gradient: Tensor, state: State, step: int, group: Mapping[str, Any]
    ) -> None:
        """Change a weight in place. step: counted from 1."""

    def misfit(self, length: int) -> str:
        """Return why a rank cannot hold a part of a row of that many values, and what to do; "" if it can."""
        ...


@runtime_checkable
class Estimator(Rule, Protocol):
    """A rule that sees all parameters before it changes any."""

    def observe(self, weight: Tensor, gradient: Tensor, state: State, group: Mapping[str, Any]) -> None:
        """See a parameter and its gradient."""

    def settle(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Estimate, once all were seen, what groups hold. Returns whether to change any parameter."""
        ...


@dataclass(frozen=True)
class Maker:
    """Makes the optimizer of a rule."""

    cfg: OptimizerConfig
    rule: Callable[[], Rule]

    def build(self, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
        """Return the optimizer of the given parameters; a group's options override the config's.

        Raises PluginError for an unknown option, CvxError where there is nothing to optimise or a setting
        would do nothing.
        """
        return Stepper(groups, self.cfg, self.rule())


class Stepper(torch.optim.Optimizer):
    """Steps by a rule. State: `step`, `master` if asked for, and what the rule keeps."""

    def __init__(self, groups: Sequence[ParamGroup], cfg: OptimizerConfig, rule: Rule):
        self._cfg, self._rule = cfg, rule
        self._names = {param: name for group in groups for name, param in group.params}
        defaults = {"lr": cfg.lr, "weight_decay": cfg.weight_decay, **rule.group}
        parts = split(groups, cfg.decay_norms, ("lr", "weight_decay", *rule.group))
        self._check()
        super().__init__(parts, defaults)
        self._gradients = HostGradients(self._names) if cfg.offload is True else None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        if not isinstance(self._rule, Estimator) or self._estimate(self._rule):
            for group, param in self._due():
                self._update(group, param)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, wherever they are."""
        super().zero_grad(set_to_none)
        if self._gradients is not None:
            self._gradients.clear()

    def with_gradient(self, param: Tensor) -> Tensor:
        """Return what holds the gradient of a parameter: the parameter, or one that stands for it."""
        return param if self._gradients is None else self._gradients.of(param)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state that `state_dict` returned."""
        load_exactly(self, state_dict)

    def _estimate(self, rule: Estimator) -> bool:
        for group, param in self._due():
            rule.observe(self._weight(param, local(param)), self._gradient(param), self._held(param), group)
        return rule.settle(self.param_groups)

    def _due(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None or self.with_gradient(param).grad is not None:
                    if not self.state[param]:
                        self._start(param)
                    yield group, param

    def _start(self, param: Tensor) -> None:
        target = local(param.detach())
        weight = self._wide(target)
        weight = weight.clone() if weight is target else weight
        state = {"step": torch.zeros(()), **self._rule.start(self._names[param], weight)}
        if self._has_master(param):
            state[MASTER] = weight
        self.state[param] = {key: laid_out(param, value) for key, value in state.items()}

    def _update(self, group: dict[str, Any], param: Tensor) -> None:
        state = self._held(param)
        state["step"] += 1
        step, target = int(state["step"]), local(param)
        weight = self._weight(param, target)
        self._rule.update(weight, self._gradient(param), state, step, group)
        if weight is target:
            return
        if self._cfg.rounding == "stochastic" and target.dtype == torch.bfloat16:
            weight = stochastic(weight, self._names[param], step)
        target.copy_(weight)

    def _held(self, param: Tensor) -> State:
        return {key: local(value) for key, value in self.state[param].items()}

    def _weight(self, param: Tensor, target: Tensor) -> Tensor:
        """Return the weight to change: the master, what is held of the parameter, or a wide copy of that."""
        state = self.state[param]
        return local(state[MASTER]) if MASTER in state else self._wide(target)

    def _gradient(self, param: Tensor) -> Tensor:
        gradient = param.grad if param.grad is not None else self.with_gradient(param).grad
        assert gradient is not None
        return self._wide(local(gradient))

    def _wide(self, value: Tensor) -> Tensor:
        """Return a tensor where and as it is computed with; itself if it is so."""
        device = torch.device("cpu") if self._cfg.offload and value.device.type != "meta" else value.device
        return value.to(device, torch.promote_types(value.dtype, torch.float32))

    def _has_master(self, param: Tensor) -> bool:
        return self._cfg.master_weights is not None and _is_half(param)

    def _check(self) -> None:
        """Raise CvxError where a setting would do nothing, or the rule cannot do with parts of parameters."""
        cfg, params = self._cfg, list(self._names)
        for name, param in ((name, param) for param, name in self._names.items()):
            if isinstance(param, DTensor):
                self._check_part(name, param)
        if cfg.master_weights is not None and not any(map(_is_half, params)):
            raise CvxError(
                "optimizer.master_weights does nothing: no trained weight is in half precision. Remove it, "
                "or set dtype: bfloat16."
            )
        if cfg.rounding == "stochastic" and all(param.dtype != torch.bfloat16 for param in params):
            raise CvxError(
                "optimizer.rounding: stochastic does nothing: no trained weight is bfloat16. Remove it, or "
                "set dtype: bfloat16."
            )

    def _check_part(self, name: str, param: DTensor) -> None:
        if not self._rule.parted:
            raise CvxError(
                f"optimizer: it needs whole parameters, and a mesh shares out {name!r}. Use adamw."
            )
        length = param.to_local().shape[1:].numel()
        if length < param.shape[1:].numel() and (why := self._rule.misfit(length)):
            raise CvxError(f"optimizer: a rank holds {length} values of each row of {name!r}, {why}")


def _is_half(param: Tensor) -> bool:
    return param.dtype in (torch.bfloat16, torch.float16)
