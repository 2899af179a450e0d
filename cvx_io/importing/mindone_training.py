"""Optimizer, schedule and steps of a training yaml of MindOne."""

from __future__ import annotations

from typing import Any

from cvx_core.errors import FormatError
from cvx_io.importing.draft import Draft, flag, whole

SCHEDULES = {
    "constant": "constant",
    "linear_decay": "linear",
    "cosine_decay": "cosine",
    "polynomial_decay": "polynomial",
}
OPTIMIZERS = {
    "adamw": "adamw",
    "adamw_re": "adamw",
    "adamw_exp": "adamw",
    "adamw_bf16": "adamw",
    "came": "came",
}


def training(draft: Draft, rows: int | None, ranks: int) -> None:
    draft.put("task.use", "train")
    draft.move("text_drop_prob", "task.text_dropout", float, 0.0)
    _optimizer(draft)
    accumulate = draft.move("gradient_accumulation_steps", "task.accumulate", whole, 1)
    steps, epochs = draft.pop("train_steps", whole, -1), draft.pop("epochs", whole)
    if steps > 0:
        draft.note("mapped", "train_steps", steps, f"task.steps: {steps}")
    elif rows is None or epochs is None or "batch" not in draft.recipe["loader"]:
        raise FormatError(
            f"{draft.source}: counts {epochs} epochs, and a recipe counts steps. Give --also train_steps=N, "
            "or have the csv it names at hand, to count its rows."
        )
    else:
        share = draft.recipe["loader"]["batch"] * accumulate * ranks
        steps = max(rows // share, 1) * epochs
        draft.note("differs", "epochs", epochs, f"task.steps: {steps}, of {rows} rows, {share} a step")
    draft.put("task.steps", steps)
    _schedule(draft, steps)
    clips = draft.pop("clip_grad", flag, False)
    norm = draft.pop("max_grad_norm", float, 1.0)
    draft.put("task.grad_clip", norm if clips else None)
    draft.note("mapped", "clip_grad, max_grad_norm", [clips, norm], "task.grad_clip")
    every = draft.pop("ckpt_save_steps", whole, -1)
    epochs_between = draft.pop("ckpt_save_interval", whole, 1)
    if every > 0:
        draft.put("task.save_every", every)
        draft.note("mapped", "ckpt_save_steps", every, f"task.save_every: {every}")
    else:
        every = max(steps // 10, 1)
        draft.put("task.save_every", every)
        draft.note(
            "differs",
            "ckpt_save_interval",
            epochs_between,
            f"counts epochs; task.save_every: {every}, a tenth of the run",
        )
    draft.move("ckpt_max_keep", "task.keep", whole, 10)


def _optimizer(draft: Draft) -> None:
    name = draft.choose("optim", OPTIMIZERS, "adamw") or "adamw"
    use = OPTIMIZERS[name]
    draft.recipe["optimizer"] = {"use": use, **draft.recipe.get("optimizer", {})}
    if name == "adamw_bf16" and draft.recipe["dtype"] != "float32":
        draft.put("optimizer.master_weights", "float32")
    draft.note("mapped", "optim", name, use)
    draft.move("start_learning_rate", "optimizer.lr", float, 1e-5)
    betas = draft.pop("betas", _floats, [0.9, 0.999])
    count = 3 if use == "came" else 2
    if len(betas) != count:
        raise FormatError(
            f"{draft.source}: betas are {betas}, and {name} has {count}. State --also 'betas=0.9 0.95"
            + (" 0.99'." if count == 3 else "'.")
        )
    draft.put("optimizer.betas", betas)
    draft.note("mapped", "betas", betas, "optimizer.betas")
    eps = draft.pop("optim_eps", _floats, [1e-8])
    if len(eps) == count - 1:
        draft.put("optimizer.eps", eps if use == "came" else eps[0])
        draft.note("mapped", "optim_eps", eps, "optimizer.eps")
    else:
        draft.note("differs", "optim_eps", eps, f"optimizer.eps: as {use} has it, which takes {count - 1}")
    draft.move("weight_decay", "optimizer.weight_decay", float, 1e-6)
    draft.put("optimizer.decay_norms", False)


def _schedule(draft: Draft, steps: int) -> None:
    name = draft.choose("scheduler", SCHEDULES, "cosine_decay") or ""
    last = draft.pop("end_learning_rate", float, 1e-7)
    draft.put("task.schedule", SCHEDULES[name])
    draft.note("mapped", "scheduler", name, f"task.schedule: {SCHEDULES[name]}")
    if name == "constant":
        draft.note("mapped", "end_learning_rate", last, "nothing: the schedule is constant")
    else:
        draft.put("task.final_lr", last / draft.recipe["optimizer"]["lr"])
        draft.note("mapped", "end_learning_rate", last, "task.final_lr, as a share of the learning rate")
    warmup = draft.pop("warmup_steps", whole, 1000)
    draft.put("task.warmup", min(warmup, steps))
    draft.note("mapped", "warmup_steps", warmup, f"task.warmup: {min(warmup, steps)}")


def _floats(value: Any) -> list[float]:
    """Return a list of numbers, of one or several."""
    given = value.split() if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    return [float(item) for item in given]
