"""What stops or leaves out a step that would do harm: values not finite, updates that change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cvx_core.interfaces import Row, Work
from cvx_core.mesh import Mesh
from cvx_parallel.gradients import local

_WATCHED = 256
"""Values of each parameter that are compared before and after an update."""


class Seen(NamedTuple):
    """What one rank found in a batch whose loss is not finite. rows: with their files and what was drawn."""

    rows: tuple[str, ...]
    cause: str


def look(work: Work, module: nn.Module, again: Callable[[], Any], rows: tuple[str, ...]) -> Seen:
    """Return where values that are not finite come from. again: runs the batch once more; rows: `named`."""
    features = work.features._asdict() if work.features is not None else {}
    bad = [name for name, value in features.items() if not _finite(value)]
    with first_bad(module) as found:
        again()
    if bad:
        cause = f"it comes with the batch: {' and '.join(bad)} of its rows"
    elif found:
        cause = f"it begins in {found[0]}"
    else:
        cause = "no module made it of finite values, so it begins in what they are given, or in the loss"
    return Seen(rows, cause)


def told(mine: Seen | None, mesh: Mesh) -> str:
    """Return what the ranks found whose own loss is not finite. Collective over the world."""
    seen = [one for one in _of_all(mine, mesh) if one is not None]
    rows = dict.fromkeys(row for one in seen for row in one.rows)
    causes = dict.fromkeys(one.cause for one in seen)
    return f"{'; '.join(causes) or 'the mean of finite losses is too large'}. Rows: {', '.join(rows)}"


@contextmanager
def first_bad(module: nn.Module) -> Iterator[list[str]]:
    """Yield a list that gets the name of the first module that makes values not finite of finite ones."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def check(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not found and not _finite(output) and _finite((args, kwargs)):
                own = part.named_parameters(recurse=False)
                broken = [key for key, param in own if not _finite(local(param.detach()))]
                found.append(f"{name!r}" + (f", whose {broken[0]} is not finite" if broken else ""))

        return check

    handles = [
        part.register_forward_hook(hook(name or type(part).__name__), with_kwargs=True)
        for name, part in module.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def bad_gradients(params: Sequence[tuple[str, Tensor]], rows: tuple[str, ...], mesh: Mesh) -> str:
    """Return which gradients are not finite, and the rows of the step. Collective over the world.

    Gradients are averages by now, so that no rank's rows are more to blame than another's.
    """
    bad = [name for name, p in params if p.grad is not None and not _finite(local(p.grad))]
    everyone = _of_all((bad, rows), mesh)
    found = {name for names, _ in everyone for name in names}
    order = [name for name, _ in params if name in found] or sorted(found)
    cause = "the norm of the gradients is too large for its precision"
    if order:
        cause = f"{len(found)} gradients are not finite, first on the way back that of {order[-1]!r}"
    return f"{cause}. Rows: {', '.join(dict.fromkeys(row for _, some in everyone for row in some))}"


def _of_all(mine: Any, mesh: Mesh) -> list[Any]:
    """Return what every rank has. Collective over the world."""
    everyone = [mine] * mesh.degrees.world
    if mesh.degrees.world > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


class Changed:
    """Tells whether an update changed anything: the first values of each parameter that this rank holds.

    Where the optimizer keeps a `master` of a parameter, that counts: many updates may pass before one shows
    in the parameter.
    """

    @torch.no_grad()
    def __init__(self, params: Sequence[Tensor], optimizer: torch.optim.Optimizer):
        self._params, self._state = params, optimizer.state
        self._before = torch.cat([self._first(param) for param in params])

    @torch.no_grad()
    def __bool__(self) -> bool:
        """Compare until a parameter has changed, which is the first one where all is well."""
        at = 0
        for param in self._params:
            now = self._first(param).to(self._before)
            if not torch.equal(self._before[at : at + len(now)], now):
                return True
            at += len(now)
        return at != len(self._before)

    def _first(self, param: Tensor) -> Tensor:
        state = self._state.get(param)
        values = local(param if state is None else state.get("master", param))
        if values.is_contiguous():  # one operation instead of three, for each of many parameters
            first = values.as_strided((min(values.numel(), _WATCHED),), (1,))
        else:
            first = values.reshape(-1)[:_WATCHED]
        if first.dtype == param.dtype == torch.float32 and first.device == param.device:
            return first
        return first.to(param.device, torch.promote_types(param.dtype, torch.float32))


def _finite(value: Any) -> bool:
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def named(row: Row, drawn: str) -> str:
    """Return a row with its file and what was drawn for it, such as a timestep."""
    facts = [str(row.video)] if row.video is not None else []
    facts += [drawn] if drawn else []
    return f"{row.id} ({', '.join(facts)})" if facts else row.id
