"""Parameters of a group come apart into decayed and exempt ones; the same for every optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cvx_core import CvxError, PluginError
from cvx_core.errors import did_you_mean
from cvx_core.interfaces import ParamGroup


def split(groups: Sequence[ParamGroup], decay_norms: bool, options: Sequence[str]) -> list[dict[str, Any]]:
    """Return groups as torch has them; their options override the optimizer's own.

    A group comes apart by device mesh too, since torch's kernels take no mixture of meshes. options: those
    that the optimizer knows. Raises PluginError for an unknown option, CvxError where nothing is optimised.
    """
    parts = [part for group in groups for part in _split(group, decay_norms, options)]
    if not parts:
        raise CvxError(
            "optimizer: no parameters to train. Is everything frozen, or do adapter targets match none?"
        )
    return parts


def _split(group: ParamGroup, decay_norms: bool, options: Sequence[str]) -> list[dict[str, Any]]:
    for option in group.options:
        if option not in options:
            hint = did_you_mean(option, options)
            raise PluginError(f"optimizer: a parameter group sets unknown option {option!r}.{hint}")
    parts: dict[tuple[bool, Any], list[Tensor]] = {}
    for name, parameter in group.params:
        is_decayed = decay_norms or not (parameter.ndim < 2 or name.endswith("bias"))
        parts.setdefault((is_decayed, getattr(parameter, "device_mesh", None)), []).append(parameter)
    return [
        {"params": params, **group.options, **({} if is_decayed else {"weight_decay": 0.0})}
        for (is_decayed, _), params in parts.items()
    ]
