"""CogVideoX-factory: `accelerate launch ... cogvideox_..._lora.py --flag value`, with its own defaults."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cvx_core.errors import FormatError
from cvx_io.importing.draft import Draft, local_model, numbers, whole

SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine-restarts",
    "polynomial": "polynomial",
}
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}
POLYNOMIAL_END = 1e-7
"""Learning rate that the source's polynomial schedule ends at."""
OPTIMIZERS = ("adamw", "adamw-8bit", "came", "prodigy")
WHOLE = ("came", "prodigy")
PRODIGY_LEAST = 0.01
"""Least learning rate that stands for a factor on Prodigy's step size."""
CAME_BETA3 = 0.9999
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


def import_factory(draft: Draft, program: str, launcher: dict[str, object], weights: Path) -> None:
    """Fill a draft from the flags of a training command of CogVideoX-factory."""
    is_lora, is_image = "lora" in program, "image_to_video" in program
    name = draft.pop("--pretrained_model_name_or_path")
    if name is None:
        raise FormatError(f"{draft.source}: names no model. Add --pretrained_model_name_or_path to it.")
    if "cogvideo" not in f"{program} {name}".lower():
        raise FormatError(f"{draft.source}: trains {name} with {program}, which is no CogVideoX.")
    draft.recipe["model"] = local_model(draft, name, weights)
    draft.note("mapped", "--pretrained_model_name_or_path", name, f"model: {draft.recipe['model']}")
    _run(draft)
    batch = draft.pop("--train_batch_size", whole, 4)
    _geometry(draft, batch)
    _data(draft)
    _optimizer(draft, batch, _processes(draft, launcher))
    if is_lora:
        _lora(draft)
    _task(draft, is_lora, is_image)
    if draft.pop("--gradient_checkpointing", bool, False):
        draft.strategy("recompute")
        draft.note("mapped", "--gradient_checkpointing", True, "parallel: recompute")
    _autoencoder(draft)
    _dropped(draft)


def _run(draft: Draft) -> None:
    draft.move("--output_dir", "output", default="cogvideox-lora")
    if "--seed" in draft.given:
        draft.move("--seed", "seed", whole)
    else:
        draft.put("seed", 0)
        draft.note("differs", "--seed", "none", "seed: 0; the source draws another one in every run")
    precision = draft.pop("--mixed_precision")
    if precision is not None:
        if precision not in PRECISIONS:
            raise FormatError(
                f"{draft.source}: --mixed_precision is {precision!r}; expected {', '.join(PRECISIONS)}."
            )
        draft.put("dtype", PRECISIONS[precision])
        text = f"dtype: {PRECISIONS[precision]}"
        if precision == "fp16":
            text += ", of the trained weights too; the source trains them in float32"
        draft.note("differs" if precision == "fp16" else "mapped", "--mixed_precision", precision, text)
    draft.move("--nccl_timeout", "timeout_s", whole, 600)


def _geometry(draft: Draft, batch: int) -> None:
    """One bucket is the recipe's video; several become loader.buckets."""
    heights = draft.pop("--height_buckets", numbers) or [draft.pop("--height", whole, 480)]
    widths = draft.pop("--width_buckets", numbers) or [draft.pop("--width", whole, 720)]
    most = draft.pop("--max_num_frames", whole, 49)
    frames = draft.pop("--frame_buckets", numbers) or [most]
    draft.move("--fps", "video.fps", whole)
    named = {"--height_buckets": heights, "--width_buckets": widths, "--frame_buckets": frames}
    single = len(heights) == len(widths) == len(frames) == 1
    for name, values in named.items():
        draft.note("mapped", name, values, "video" if single else "loader.buckets")
    if single:
        draft.recipe.setdefault("video", {}).update(frames=frames[0], height=heights[0], width=widths[0])
        draft.put("loader.batch", batch)
        draft.note("mapped", "--train_batch_size", batch, f"loader.batch: {batch}")
    else:
        sizes = [f"{height}x{width}" for height in heights for width in widths]
        draft.put("loader.buckets", {size: {count: [1.0, batch] for count in frames} for size in sizes})
        draft.note("mapped", "--train_batch_size", batch, "the batch of every bucket")
    _legal_frames(draft, frames)
    draft.note(
        "differs",
        "frames of a clip",
        "",
        "are picked at video.fps; the source spreads them over the whole clip, whatever its rate",
    )
    draft.note("mapped", "--max_num_frames", most, "the largest of the frame buckets holds")
    start, end = draft.pop("--skip_frames_start", whole, 0), draft.pop("--skip_frames_end", whole, 0)
    if start or end:
        draft.put("video.skip", max(start, end))
        text = f"video.skip: {max(start, end)}, at both ends"
        draft.note(
            "mapped" if start == end else "differs",
            "--skip_frames_start, --skip_frames_end",
            [start, end],
            text,
        )


def _legal_frames(draft: Draft, frames: list[int]) -> None:
    """Allow frame counts that the release was not made for, where the source trains on them."""
    step = 16 if "1.5" in Path(draft.recipe["model"]).name else 8
    if any((count - 1) % step for count in frames) and not any((count - 1) % 4 for count in frames):
        draft.put("predictor.card", {"frames_step": 4})
        text = f"predictor.card.frames_step: 4; the model was released for {step}*N+1"
        draft.note("stated", "frames", frames, text)


def _data(draft: Draft) -> None:
    root = draft.pop("--data_root") or draft.pop("--instance_data_root") or "."
    captions, videos = draft.pop("--caption_column", str, "text"), draft.pop("--video_column", str, "video")
    table = draft.pop("--dataset_file")
    if table is None:
        files = {"prompts": str(Path(root) / captions), "videos": str(Path(root) / videos)}
        draft.recipe["dataset"] = {"use": "prompts-videos", **files, "root": root}
    else:
        columns = {"video_column": videos, "caption_column": captions}
        draft.recipe["dataset"] = {"use": "csv", "path": table, "root": root, **columns}
    for name, value in (("--data_root", root), ("--caption_column", captions), ("--video_column", videos)):
        draft.note("mapped", name, value, f"dataset: {draft.recipe['dataset']['use']}")
    if table is not None:
        draft.note("mapped", "--dataset_file", table, f"dataset.path: {table}")
    draft.move("--dataloader_num_workers", "loader.workers", whole)


def _processes(draft: Draft, launcher: dict[str, object]) -> int:
    """Return the number of devices that the launcher is told; say how to start as many."""
    ids = str(launcher.pop("--gpu_ids", "0"))
    count = whole(launcher.pop("--num_processes", len(ids.split(",")) if ids != "all" else 1))
    draft.note("mapped", "accelerate launch --gpu_ids", ids, f"{count} devices")
    config = str(launcher.pop("--config_file", ""))
    sharded = "deepspeed" in config or "fsdp" in config
    if count > 1 or sharded:
        draft.strategy("zero2" if sharded else "ddp")
        draft.note(
            "mapped",
            "accelerate launch",
            f"{count} devices",
            f"parallel; start it with torchrun --nproc-per-node {count} -m cvx_core.run RECIPE",
        )
    if config:
        text = "is not read; the strategies are under `parallel`"
        draft.note("differs" if sharded else "no counterpart", "--config_file", config, text)
    for name, value in launcher.items():
        draft.note("no counterpart", f"accelerate launch {name}", value, "is the launcher's own")
    return count


def _optimizer(draft: Draft, batch: int, processes: int) -> None:
    use = _optimizer_name(draft)
    rate = draft.pop("--learning_rate", float, 1e-4)
    draft.recipe["optimizer"] = {"use": use}
    accumulate = draft.pop("--gradient_accumulation_steps", whole, 1)
    draft.put("task.use", "train")
    draft.put("task.accumulate", accumulate)
    draft.note("mapped", "--gradient_accumulation_steps", accumulate, f"task.accumulate: {accumulate}")
    factor = batch * accumulate * processes if draft.pop("--scale_lr", bool, False) else 1
    _rate(draft, use, rate, factor)
    _formula(draft, use)
    draft.move("--weight_decay", "optimizer.weight_decay", float, 1e-4)
    draft.put("optimizer.decay_norms", True)
    draft.note("stated", "weight decay of norms and biases", "true", "optimizer.decay_norms: true")
    offloads = ("--use_cpu_offload_optimizer", "--offload_gradients")
    if draft.has(*offloads):
        _offload(draft, offloads)
    shared = next((part for part in draft.recipe.get("parallel", []) if part["use"] == "zero2"), None)
    if shared is not None and use in WHOLE:
        shared["use"] = "ddp"
        draft.note("differs", "--optimizer", use, "parallel: ddp, for it needs whole parameters")


def _offload(draft: Draft, names: Sequence[str]) -> None:
    used = [part["use"] for part in draft.recipe.get("parallel", [])]
    if "zero2" in used:
        draft.drop(names, "zero2 shares the state out; use ddp to offload it")
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


def _rate(draft: Draft, use: str, rate: float, factor: int) -> None:
    scaled = rate * factor
    if use == "prodigy" and scaled < PRODIGY_LEAST:
        draft.put("optimizer.lr", 1.0)
        text = "optimizer.lr: 1.0; prodigy finds the step size, and the source takes that share of it"
        draft.note("differs", "--learning_rate", scaled, text)
        return
    draft.put("optimizer.lr", scaled)
    name, text = ("--scale_lr", f"{rate} x {factor}") if factor != 1 else ("--learning_rate", f"{rate}")
    draft.note("mapped", name, True if factor != 1 else rate, f"optimizer.lr: {text}")


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


def _lora(draft: Draft) -> None:
    draft.recipe["adapter"] = {"use": "lora"}
    draft.move("--rank", "adapter.rank", whole, 64)
    draft.move("--lora_alpha", "adapter.alpha", float, 64.0)
    draft.put("adapter.targets", TARGETS)
    draft.note("stated", "target modules", TARGETS, "adapter.targets")


def _task(draft: Draft, is_lora: bool, is_image: bool) -> None:
    steps = draft.pop("--max_train_steps", whole)
    epochs = draft.pop("--num_train_epochs", whole)
    if steps is None:
        raise FormatError(
            f"{draft.source}: counts {epochs or 1} epochs, and a recipe counts steps. Add --max_train_steps."
        )
    draft.put("task.steps", steps)
    draft.note("mapped", "--max_train_steps", steps, f"task.steps: {steps}")
    if epochs is not None:
        draft.note(
            "no counterpart", "--num_train_epochs", epochs, "--max_train_steps holds, as in the source"
        )
    _schedule(draft)
    draft.move("--max_grad_norm", "task.grad_clip", float, 1.0)
    draft.put("task.text_dropout", 0.0)
    draft.note("stated", "text dropout", "0", "task.text_dropout: 0, for the source has none")
    if is_image:
        draft.move("--noised_image_dropout", "task.image_dropout", float, 0.05)
        draft.put("task.image_noise", [-3.0, 0.5])
        draft.note("stated", "noise on the image", "exp(N(-3, 0.5))", "task.image_noise: [-3.0, 0.5]")
    every = draft.move("--checkpointing_steps", "task.save_every", whole, 500)
    keep = draft.pop("--checkpoints_total_limit", whole)
    draft.put("task.keep", keep if keep is not None else steps // every + 1)
    text = f"task.keep: {draft.recipe['task']['keep']}" + (
        "" if keep is not None else ", which is all of them"
    )
    draft.note("mapped" if keep is not None else "stated", "--checkpoints_total_limit", keep, text)
    resume = draft.pop("--resume_from_checkpoint")
    if resume == "latest":
        draft.put("task.resume", "auto")
        draft.note("mapped", "--resume_from_checkpoint", resume, "task.resume: auto")
    elif resume is not None:
        draft.note(
            "no counterpart",
            "--resume_from_checkpoint",
            resume,
            "convert its weights with `cvx convert`; the optimizer's state starts anew",
        )
    if is_lora:
        draft.put("task.export", {"use": "diffusers-lora"})
        draft.note("stated", "the LoRA is saved at the end", "", "task.export: diffusers-lora")
    else:
        draft.put("task.export", {"use": "hf"})
        draft.put("task.export_whole", True)
        draft.note("stated", "the pipeline is saved at the end", "", "task.export: hf, whole")


def _schedule(draft: Draft) -> None:
    name, warmup = draft.pop("--lr_scheduler", str, "constant"), draft.pop("--lr_warmup_steps", whole, 500)
    if name not in SCHEDULES:
        raise FormatError(f"{draft.source}: --lr_scheduler is {name!r}; expected {', '.join(SCHEDULES)}.")
    draft.put("task.schedule", SCHEDULES[name])
    draft.note("mapped", "--lr_scheduler", name, f"task.schedule: {SCHEDULES[name]}")
    if name == "constant":
        draft.note(
            "mapped", "--lr_warmup_steps", warmup, "nothing: `constant` has no warm-up in the source either"
        )
    else:
        draft.put("task.warmup", min(warmup, draft.recipe["task"]["steps"]))
        draft.note("mapped", "--lr_warmup_steps", warmup, f"task.warmup: {draft.recipe['task']['warmup']}")
    cycles, power = draft.pop("--lr_num_cycles", whole, 1), draft.pop("--lr_power", float, 1.0)
    if name == "cosine_with_restarts":
        draft.put("task.restarts", cycles)
        draft.note("mapped", "--lr_num_cycles", cycles, f"task.restarts: {cycles}")
    if name == "polynomial":
        draft.put("task.power", power)
        draft.put("task.final_lr", POLYNOMIAL_END / draft.recipe["optimizer"]["lr"])
        draft.note("mapped", "--lr_power", power, f"task.power: {power}, down to {POLYNOMIAL_END}")


def _autoencoder(draft: Draft) -> None:
    if draft.pop("--enable_tiling", bool, False):
        draft.recipe["autoencoder"] = {"use": "cogvideox-vae", "tile": {"height": 240, "width": 360}}
        draft.note("mapped", "--enable_tiling", True, "autoencoder.tile: 240x360")
    draft.drop(("--enable_slicing",), "is not needed: it changes no result; lower loader.batch for memory")


def _trackers(draft: Draft) -> None:
    """Say where the run is shown. Another package than TensorBoard may not be here, so it is not put in."""
    where = draft.pop("--report_to")
    if where == "tensorboard":
        draft.note("mapped", "--report_to", where, "task.trackers: tensorboard, which is the default")
    elif where is not None:
        known = where if where in ("wandb", "trackio") else "wandb"
        text = f"add `trackers: [{{use: {known}}}]` to the task where that package is installed"
        draft.note("no counterpart", "--report_to", where, text)
    draft.drop(("--tracker_name",), "is the `project` of a tracker in task.trackers")
    draft.drop(("--logging_dir",), "log.jsonl, TensorBoard files and report.html are in the output folder")


def _dropped(draft: Draft) -> None:
    draft.drop(("--id_token",), "write it at the start of every caption")
    draft.drop(("--random_flip",), "flip the clips beforehand")
    draft.drop(
        ("--load_tensors",),
        "its files are not read; clips are encoded as they come",
    )
    draft.drop(("--pin_memory", "--enable_model_cpu_offload"), "is not needed, and changes no result")
    draft.drop(("--allow_tf32",), "changes nothing in bfloat16; float32 is computed in float32")
    validation = ("prompt", "images", "prompt_separator", "epochs", "steps")
    draft.drop(
        (
            "--num_validation_videos",
            "--guidance_scale",
            "--use_dynamic_cfg",
            *(f"--validation_{part}" for part in validation),
        ),
        "state task.validation (docs/validation.md), or sample from the result with the task `sample`",
    )
    _trackers(draft)
    draft.drop(("--push_to_hub", "--hub_token", "--hub_model_id"), "upload the result yourself")
    draft.drop(("--revision", "--variant", "--cache_dir"), "nothing is fetched by a run; download that one")
