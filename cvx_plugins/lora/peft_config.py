"""A LoRA's ranks and alphas as PEFT's LoraConfig states them, which diffusers keeps too. No torch.

Source of the meaning of the fields: huggingface/peft src/peft/tuners/lora/config.py and model.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

from cvx_core import FormatError
from cvx_io.lora_state import Shape, single
from cvx_io.regroup import listed

V = TypeVar("V", int, float)

VARIANTS = (
    "use_rslora",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "velora_config",
)
"""Fields that make an adapter more, or other, than alpha / r * B A."""
BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initial values that are taken out of the model's own weights, so that the adapter fits no other model."""


def config_of(shapes: Mapping[str, Shape], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Return the fields that state the modules, and rank and alpha of each; patterns hold the exceptions."""
    rank, ranks = _usual({module: shape.rank for module, shape in shapes.items()})
    alpha, others = _usual({module: plain(alphas[module]) for module in shapes})
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": others,
        "target_modules": list(shapes),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def alphas_in(config: Mapping[str, Any], shapes: Mapping[str, Shape], where: str) -> dict[str, float]:
    """Return {module: alpha}, empty where the config states none.

    Raises FormatError on variants of LoRA, and where the ranks in the config are not those of the factors.
    """
    _refuse_variants(config, where)
    ranks = _by_module(config, "r", "rank_pattern", shapes, where)
    for module, rank in ranks.items():
        if rank != shapes[module].rank:
            raise FormatError(
                f"{where}: rank {rank:g} of {module!r} in the config is not that of its factors, "
                f"{shapes[module].rank}. Config and weights are of different exports."
            )
    return _by_module(config, "lora_alpha", "alpha_pattern", shapes, where)


def check_targets(config: Mapping[str, Any], shapes: Mapping[str, Shape], where: str) -> None:
    """Raise FormatError on modules with factors that the config does not target, as PEFT would skip them."""
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return
    try:
        skipped = [module for module in shapes if not _is_target(module, targets)]
    except (re.error, TypeError) as error:
        raise FormatError(f"{where}: target_modules cannot be read: {error}. Export again.") from error
    if skipped:
        raise FormatError(
            f"{where}: target_modules leaves out {len(skipped)} modules with factors: {listed(skipped)}. "
            "Config and weights are of different exports."
        )


def plain(alpha: float) -> float | int:
    """Return an alpha as the shortest number that is the same in single precision."""
    if alpha.is_integer():
        return int(alpha)
    return next(short for digits in range(1, 18) if single(short := float(f"{alpha:.{digits}g}")) == alpha)


def _usual(values: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """Return the most frequent value, and {pattern: value} of the modules with others."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {f"^{module}": value for module, value in values.items() if value != usual}


def _by_module(
    config: Mapping[str, Any], usual: str, pattern: str, shapes: Mapping[str, Shape], where: str
) -> dict[str, float]:
    """Return each module's value: of the first pattern that matches the end of its name, else the usual."""
    try:
        patterns = [
            (re.compile(rf"(.*\.)?({key})$"), float(value))
            for key, value in (config.get(pattern) or {}).items()
        ]
        default = None if config.get(usual) is None else float(config[usual])
    except (re.error, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{where}: {usual} or {pattern} cannot be read: {error}. Export again.") from error
    found = {
        module: next((value for key, value in patterns if key.match(module)), default) for module in shapes
    }
    return {module: value for module, value in found.items() if value is not None}


def _refuse_variants(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise FormatError(f"{where}: peft_type is {kind}; only LORA can be used. Merge it with PEFT instead.")
    if used := [name for name in VARIANTS if config.get(name)]:
        raise FormatError(
            f"{where}: {', '.join(used)} in use, so a weight does not change by alpha / r * B A alone. "
            "Merge it with PEFT instead, or train a plain LoRA."
        )
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(BASE_CHANGED):
        raise FormatError(
            f"{where}: started by {initial!r}, which changes the model's own weights. Let PEFT export it "
            "as a plain LoRA: save_pretrained with path_initial_model_for_weight_conversion."
        )


def _is_target(module: str, targets: Any) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)
