"""CogVideoX-factory: `accelerate launch ... cogvideox_..._lora.py --flag value`, with its own defaults."""

from __future__ import annotations

from pathlib import Path

from cvx_core.errors import FormatError
from cvx_io.importing import factory_mindone, release
from cvx_io.importing.draft import Draft, local_model, whole
from cvx_io.importing.factory_data import clips, geometry
from cvx_io.importing.factory_optimizer import optimizer
from cvx_io.importing.launcher import Launch

SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine-restarts",
    "polynomial": "polynomial",
}
POLYNOMIAL_END = 1e-7
"""Learning rate that the source's polynomial schedule ends at."""
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


def import_factory(draft: Draft, program: str, launch: Launch, script: Path, weights: Path) -> None:
    """Fill a draft from the flags of a training command of CogVideoX-factory, or of MindOne's version."""
    is_lora, is_image = "lora" in program, "image_to_video" in program
    name = draft.pop("--pretrained_model_name_or_path")
    if name is None:
        raise FormatError(f"{draft.source}: names no model. Add --pretrained_model_name_or_path to it.")
    if "cogvideo" not in f"{program} {name}".lower():
        raise FormatError(f"{draft.source}: trains {name} with {program}, which is no CogVideoX.")
    draft.recipe["model"] = local_model(draft, name, weights)
    draft.note("mapped", "--pretrained_model_name_or_path", name, f"model: {draft.recipe['model']}")
    of_mindone = factory_mindone.is_mindone(draft, launch)
    _run(draft, launch)
    ranks = factory_mindone.mesh(draft, launch) if of_mindone else _mesh(draft, launch)
    batch = draft.pop("--train_batch_size", whole, 4)
    if of_mindone and factory_mindone.buckets(draft, script, name):
        draft.note("mapped", "--train_batch_size", batch, "--scale_lr alone: each bucket states its own")
    else:
        geometry(draft, batch, of_mindone)
    clips(draft)
    optimizer(draft, batch, ranks)
    if is_lora:
        _lora(draft)
    _task(draft, is_lora, is_image)
    if draft.pop("--gradient_checkpointing", bool, False):
        draft.strategy("recompute")
        draft.note("mapped", "--gradient_checkpointing", True, "parallel: recompute")
    _autoencoder(draft)
    if of_mindone:
        factory_mindone.rest(draft, name)
    _positions(draft, name)
    _dropped(draft)
    launch.leave(draft)


def _run(draft: Draft, launch: Launch) -> None:
    draft.move("--output_dir", "output", default="cogvideox-lora")
    if "--seed" in draft.given:
        draft.move("--seed", "seed", whole)
    else:
        draft.put("seed", 0)
        draft.note("differs", "--seed", "none", "seed: 0; the source draws another one in every run")
    _precision(draft, launch)
    draft.move("--nccl_timeout", "timeout_s", whole, 600)


def _precision(draft: Draft, launch: Launch) -> None:
    """Put the precision: the program's, else what accelerate is told, else float32, as in the source."""
    name, told = "--mixed_precision", launch.flags.pop("--mixed_precision", None)
    told = told or launch.config.get("mixed_precision")
    config = launch.flags.get("--config_file")
    if not draft.has(name) and told is None and config is not None and not launch.config:
        text = f"dtype: auto, the precision of the release; {config}, which may state another, is not at hand"
        draft.note("differs", name, "none", text)
        return
    if not draft.has(name):
        # YAML 1.1 reads a bare `no` as false.
        draft.given[name] = str(told) if told else "no"
        whose = "what accelerate is told" if told else "the source's default"
        draft.notes.append(f"{name} {draft.given[name]} is {whose}, for the command states none")
    release.dtype(draft, name, draft.choose(name, release.PRECISIONS) or "no", "")


def _mesh(draft: Draft, launch: Launch) -> int:
    """Add the data strategy; return the number of devices."""
    strategy, config = launch.strategy(), launch.flags.get("--config_file")
    count = launch.devices(draft)
    if count > 1 or strategy != "ddp":
        draft.strategy(strategy)
    inner = launch.config.get("deepspeed_config") or {}
    if config is not None:
        launch.flags.pop("--config_file")
        what = f"parallel: {strategy}" if count > 1 or strategy != "ddp" else "one device"
        text = f"is not at hand; by its name, {what}"
        at_hand = bool(launch.config)
        draft.note(
            "mapped" if at_hand else "differs", "--config_file", config, f"read: {what}" if at_hand else text
        )
    for name in ("offload_optimizer_device", "offload_param_device"):
        if str(inner.get(name, "none")) != "none":
            draft.note("no counterpart", name, inner[name], f"{strategy} keeps its share on the device")
    theirs, ours = (
        inner.get("gradient_accumulation_steps"),
        draft.given.get("--gradient_accumulation_steps", 1),
    )
    if theirs not in (None, "auto") and str(theirs) != str(ours):
        text = (
            f"task.accumulate follows the program's {ours}; DeepSpeed may take this one instead: if so, "
            f"--also gradient_accumulation_steps={theirs}"
        )
        draft.note("differs", f"gradient_accumulation_steps of {config}", theirs, text)
    return count


def _positions(draft: Draft, name: str) -> None:
    """Refuse to leave out learned positions, which one release has."""
    flag = "--ignore_learned_positional_embeddings"
    if draft.pop(flag, bool, False):
        if "i2v" in name.lower() and not release.is_1_5(name):
            raise FormatError(
                f"{draft.source}: {flag} trains {name} without its learned positions, and a recipe keeps "
                "them, at 480x720. Take the flag out, or train the 1.5 model, which has none."
            )
        draft.note("mapped", flag, True, "nothing: this model has no learned positions")


def _lora(draft: Draft) -> None:
    draft.recipe["adapter"] = {"use": "lora"}
    rank = "--lora_rank" if draft.has("--lora_rank") else "--rank"
    draft.move(rank, "adapter.rank", whole, 64)
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
    name = draft.choose("--lr_scheduler", SCHEDULES, "constant") or "constant"
    warmup = draft.pop("--lr_warmup_steps", whole, 500)
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
