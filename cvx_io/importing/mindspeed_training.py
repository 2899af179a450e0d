"""Batches, optimizer, schedule and LoRA of MindSpeed-MM's flags."""

from __future__ import annotations

from cvx_core.errors import FormatError
from cvx_io.importing.draft import Draft, whole, words

MODEL, DATA = "model.", "data."
"""What the settings of the two json files are prefixed with."""
SCHEDULES = {"constant": "constant", "linear": "linear", "cosine": "cosine"}
LORA_TARGETS = {"proj_qkv": ["to_q", "to_k", "to_v"], "proj_out": ["to_out.0"]}


def batches(draft: Draft, ranks: int) -> None:
    """Put the batch of a rank, and how many are accumulated. ranks: those that read different rows."""
    micro = draft.pop("--micro-batch-size", whole, 1)
    total = draft.pop("--global-batch-size", whole, micro * ranks)
    if total % (micro * ranks):
        raise FormatError(
            f"{draft.source}: --global-batch-size {total} is no multiple of {micro} x {ranks} data ranks."
        )
    draft.put("loader.batch", micro)
    draft.put("task.accumulate", total // (micro * ranks))
    draft.note("mapped", "--micro-batch-size", micro, f"loader.batch: {micro}")
    draft.note("mapped", "--global-batch-size", total, f"task.accumulate: {total // (micro * ranks)}")


def training(draft: Draft) -> None:
    """Put optimizer, schedule, steps and checkpoints. Raises FormatError for what has no counterpart."""
    steps = draft.move("--train-iters", "task.steps", whole)
    if steps is None:
        raise FormatError(f"{draft.source}: gives no --train-iters. Add it.")
    draft.recipe["optimizer"] = {"use": "adamw", **draft.recipe.get("optimizer", {})}
    rate = draft.move("--lr", "optimizer.lr", float)
    if rate is None:
        raise FormatError(f"{draft.source}: gives no --lr. Add it.")
    first, second = draft.pop("--adam-beta1", float, 0.9), draft.pop("--adam-beta2", float, 0.999)
    draft.put("optimizer.betas", [first, second])
    draft.note("mapped", "--adam-beta1, --adam-beta2", [first, second], "optimizer.betas")
    draft.move("--adam-eps", "optimizer.eps", float, 1e-8)
    draft.move("--weight-decay", "optimizer.weight_decay", float, 0.01)
    draft.put("optimizer.decay_norms", False)
    draft.move("--clip-grad", "task.grad_clip", float, 1.0)
    style = draft.choose("--lr-decay-style", SCHEDULES, "linear") or "linear"
    least = draft.pop("--min-lr", float, 0.0)
    draft.put("task.schedule", SCHEDULES[style])
    draft.note("mapped", "--lr-decay-style", style, f"task.schedule: {style}")
    if style != "constant":
        draft.put("task.final_lr", least / rate)
        draft.note(
            "mapped", "--min-lr", least, f"task.final_lr: {least / rate:g}, as a share of the learning rate"
        )
    else:
        draft.note("mapped", "--min-lr", least, "nothing: the schedule is constant")
    warmup, start = draft.pop("--lr-warmup-iters", whole, 0), draft.pop("--lr-warmup-init", float, 0.0)
    draft.put("task.warmup", min(warmup, steps))
    draft.note(
        "differs" if warmup and start else "mapped",
        "--lr-warmup-iters, --lr-warmup-init",
        [warmup, start],
        f"task.warmup: {min(warmup, steps)}, from 0",
    )
    every = draft.move("--save-interval", "task.save_every", whole)
    draft.put("task.keep", steps // every + 1 if every else 1)
    draft.note("stated", "checkpoints", "all are kept", f"task.keep: {draft.recipe['task']['keep']}")
    draft.move("--log-interval", "task.log_every", whole)


def lora(draft: Draft) -> None:
    """Put the adapter, where there is one. Raises FormatError for other layers than it may be on."""
    rank = draft.pop("--lora-r", whole)
    if rank is None:
        return
    named = draft.pop("--lora-target-modules", words, ["proj_qkv", "proj_out"])
    unknown = [name for name in named if name not in LORA_TARGETS]
    if unknown:
        raise FormatError(
            f"{draft.source}: --lora-target-modules names {unknown[0]!r}; expected {', '.join(LORA_TARGETS)}."
        )
    targets = [ours for name in named for ours in LORA_TARGETS[name]]
    draft.recipe["adapter"] = {"use": "lora", "rank": rank, "targets": targets}
    draft.note("mapped", "--lora-r", rank, f"adapter.rank: {rank}")
    text = (
        "adapter.targets; to_q, to_k and to_v have an A each, where the source's joint layer has one for all"
    )
    draft.note("differs" if "proj_qkv" in named else "mapped", "--lora-target-modules", named, text)
    draft.move("--lora-alpha", "adapter.alpha", float, 16.0)
    draft.move("--lora-dropout", "adapter.dropout", float, 0.0)
    draft.drop(["--lora-register-forward-hook"], "is not needed")


def image(draft: Draft) -> None:
    """Put what becomes of the first frame."""
    place = f"{MODEL}ae.i2v_processor."
    draft.move(f"{place}noised_image_dropout", "task.image_dropout", float, 0.0)
    noised = draft.pop(f"{place}noised_image_input", bool, True)
    draft.put("task.image_noise", [-3.0, 0.5] if noised else None)
    draft.note("mapped", f"{place}noised_image_input", noised, "task.image_noise")
