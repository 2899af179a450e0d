"""The optimizers of CogVideoX-factory, and of MindOne's version of it, with their own defaults."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cvx_io.importing.draft import Draft, whole

OPTIMIZERS = ("adamw", "adamw-8bit", "came", "prodigy")
WHOLE = ("came", "prodigy")
"""Those that need whole parameters."""
SHARED = ("zero1", "zero2", "zero3")
PRODIGY_LEAST = 0.01
"""Least learning rate that stands for a factor on Prodigy's step size."""
CAME_BETA3 = 0.9999


def optimizer(draft: Draft, batch: int, ranks: int) -> None:
    """Put the optimizer. batch: of one rank; ranks: those that read different rows."""
    use = _optimizer_name(draft)
    rate = draft.pop("--learning_rate", float, 1e-4)
    draft.recipe["optimizer"] = {"use": use, **draft.recipe.get("optimizer", {})}
    accumulate = draft.pop("--gradient_accumulation_steps", whole, 1)
    draft.put("task.use", "train")
    draft.put("task.accumulate", accumulate)
    draft.note("mapped", "--gradient_accumulation_steps", accumulate, f"task.accumulate: {accumulate}")
    _rate(draft, use, rate, (batch, accumulate, ranks))
    _formula(draft, use)
    draft.move("--weight_decay", "optimizer.weight_decay", float, 1e-4)
    draft.put("optimizer.decay_norms", True)
    draft.note("stated", "weight decay of norms and biases", "true", "optimizer.decay_norms: true")
    offloads = ("--use_cpu_offload_optimizer", "--offload_gradients")
    if draft.has(*offloads):
        _offload(draft, offloads)
    whole_parameters(draft, use, "--optimizer")


def whole_parameters(draft: Draft, use: str, name: str) -> None:
    """Have parameters kept whole for an optimizer that needs them so."""
    shared = next((part for part in draft.recipe.get("parallel", []) if part["use"] in SHARED), None)
    if shared is not None and use in WHOLE:
        shared["use"] = "ddp"
        draft.note("differs", f"{name} {use}", "", "parallel: ddp, for it needs whole parameters")


def _offload(draft: Draft, names: Sequence[str]) -> None:
    used = [part["use"] for part in draft.recipe.get("parallel", [])]
    shared = next((use for use in used if use in SHARED), None)
    if shared is not None:
        draft.drop(names, f"{shared} shares the state out; use ddp to offload it")
        return
    both = draft.given.get(names[1]) is not None
    draft.put("optimizer.offload", (both and "ddp" not in used) or "state")
    for name in names:
        if draft.has(name):
            draft.pop(name, bool)
            if name == names[1] and "ddp" in used:
                draft.note("no counterpart", name, True, "gradients stay, for ddp exchanges them")
            else:
                draft.note("mapped", name, True, f"optimizer.offload: {draft.recipe['optimizer']['offload']}")


def _optimizer_name(draft: Draft) -> str:
    """Return the component that stands for the source's optimizer."""
    name = draft.pop("--optimizer", str, "adam").lower()
    small, smaller = draft.pop("--use_8bit", bool, False), draft.pop("--use_4bit", bool, False)
    if draft.pop("--use_torchao", bool, False):
        draft.note("no counterpart", "--use_torchao", True, "state in 8 bits is computed without a library")
    plain = name.replace("-", "").replace("_", "")
    if plain == "adamwbf16":
        return _adamw_bf16(draft, name)
    use = {"adam": "adamw", "adam8bit": "adamw-8bit", "adamw8bit": "adamw-8bit"}.get(plain, plain)
    if use not in OPTIMIZERS:
        draft.note(
            "differs", "--optimizer", name, "adamw, which the source takes too for a name it knows not"
        )
        use = "adamw"
    elif plain.startswith("adam") and not plain.startswith("adamw"):
        text = "decay apart from the gradient; the source adds it to the gradient"
        draft.note("differs", "--optimizer", name, f"{use}: {text}")
    else:
        draft.note("mapped", "--optimizer", name, use)
    if (small or smaller) and use == "adamw":
        use, flag = "adamw-8bit", "--use_4bit" if smaller else "--use_8bit"
        draft.note("differs" if smaller else "mapped", flag, True, "optimizer: adamw-8bit")
    return use


def _adamw_bf16(draft: Draft, name: str) -> str:
    """AdamW over a float32 copy of the weights."""
    text = "adamw"
    if draft.recipe.get("dtype") != "float32":
        draft.put("optimizer.master_weights", "float32")
        text = "adamw, optimizer.master_weights: float32"
    draft.note("mapped", "--optimizer", name, text)
    return "adamw"


def _rate(draft: Draft, use: str, rate: float, factors: tuple[int, int, int]) -> None:
    """Put the learning rate. factors: batch, accumulation and ranks, by which --scale_lr multiplies it."""
    is_scaled = draft.pop("--scale_lr", bool, False)
    scaled = rate * math.prod(factors) if is_scaled else rate
    if is_scaled:
        of = "batch {} x accumulation {} x data ranks {}".format(*factors)
        draft.note("mapped", "--scale_lr", True, f"optimizer.lr: {scaled:g}, which is {rate:g} x {of}")
    if use == "prodigy" and scaled < PRODIGY_LEAST:
        draft.put("optimizer.lr", 1.0)
        text = "optimizer.lr: 1.0; prodigy finds the step size, and the source takes that share of it"
        draft.note("differs", "--learning_rate", scaled, text)
        return
    draft.put("optimizer.lr", scaled)
    if not is_scaled:
        draft.note("mapped", "--learning_rate", rate, f"optimizer.lr: {rate}")


def _formula(draft: Draft, use: str) -> None:
    """Map what the optimizers' formulas take."""
    first = draft.pop("--beta1", float) or draft.pop("--adam_beta1", float, 0.9)
    second = draft.pop("--beta2", float) or draft.pop("--adam_beta2", float, 0.95)
    betas = [first, second]
    if use == "came":
        betas.append(draft.pop("--beta3", float, CAME_BETA3))
        draft.drop(("--epsilon",), "came has two of its own, as in the source")
    else:
        draft.move("--epsilon", "optimizer.eps", float, 1e-8)
    draft.put("optimizer.betas", betas)
    names = ", ".join(f"--beta{number + 1}" for number in range(len(betas)))
    draft.note("mapped", names, betas, f"optimizer.betas: {betas}")
    prodigy = ("decouple", "use_bias_correction", "safeguard_warmup")
    if use == "prodigy":
        draft.move("--beta3", "optimizer.beta3", float)
        for name in prodigy:
            draft.move(f"--prodigy_{name}", f"optimizer.{name.removeprefix('use_')}", bool, False)
    draft.drop(("--beta3", *(f"--prodigy_{name}" for name in prodigy)), "belongs to prodigy")
