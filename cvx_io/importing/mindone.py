"""MindOne (examples/opensora_hpcai, CogVideoX): a training yaml, and the flags of a command that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cvx_core.errors import FormatError
from cvx_io.importing.draft import Draft, whole

VERSIONS = {
    "CogVideoX-2B": "cogvideox-2b",
    "CogVideoX-5B": "cogvideox-5b",
    "CogVideoX-5B-v1.5": "cogvideox-1.5-5b",
    "CogVideoX-5B-v1.5-I2V": "cogvideox-1.5-5b-i2v",
}
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SCHEDULES = {
    "constant": "constant",
    "linear_decay": "linear",
    "cosine_decay": "cosine",
    "polynomial_decay": "polynomial",
}
EVALUATE = "measure with the task `evaluate`"
READING = (
    "prefetch_size", "max_rowsize", "num_workers_dataset", "num_workers_batch", "data_multiprocessing",
    "video_backend", "dataset_sink_mode", "sink_size", "filter_data",
)  # fmt: skip
MINDSPORE = (
    "mode", "jit_level", "device_target", "max_device_memory", "enable_flash_attention", "save_graphs",
    "parallel_mode", "dsp", "vae_micro_batch_size", "vae_micro_frame_size", "vae_keep_gn_fp32", "step_mode",
    "vae_param_dtype", "vae_amp_level", "global_bf16", "custom_train", "profile", "log_level", "debug",
    "add_datetime", "drop_overflow_update", "loss_scale_factor", "scale_window", "disable_flip",
)  # fmt: skip
OPTIMIZERS = ("adamw", "adamw_re", "adamw_exp")


def import_mindone(draft: Draft, rows: int | None) -> None:
    """Fill a draft from the settings of a training yaml. rows: clips, where the source counts epochs."""
    version = draft.pop("model_version")
    if version not in VERSIONS:
        raise FormatError(f"{draft.source}: model_version is {version!r}; expected {', '.join(VERSIONS)}.")
    draft.recipe |= {"device": "npu", "predictor": {"use": VERSIONS[version]}}
    draft.note("mapped", "model_version", version, f"predictor: {VERSIONS[version]}")
    _precision(draft)
    draft.move("output_path", "output", default="output")
    draft.move("seed", "seed", whole, 3407)
    _weights(draft)
    _video(draft)
    _noise(draft)
    _data(draft)
    _training(draft, rows)
    _parallel(draft)
    _rest(draft)


def _precision(draft: Draft) -> None:
    precision = draft.pop("dtype", str, "fp16")
    if precision not in PRECISIONS:
        raise FormatError(f"{draft.source}: dtype is {precision!r}; expected {', '.join(PRECISIONS)}.")
    draft.put("dtype", PRECISIONS[precision])
    draft.note("mapped", "dtype", precision, f"dtype: {PRECISIONS[precision]}, of all weights")


def _weights(draft: Draft) -> None:
    files = draft.pop("pretrained_model_path", lambda value: value)
    first = files[0] if isinstance(files, list) else files
    if first:
        folder = str(Path(str(first)).parent) if isinstance(files, list) else str(first)
        draft.put("predictor.weights", {"use": "hf", "path": folder})
        draft.note("mapped", "pretrained_model_path", files, f"predictor.weights: {folder}")
    vae = draft.pop("vae_checkpoint")
    draft.recipe["autoencoder"] = {"use": "cogvideox-vae"}
    if vae:
        folder = str(Path(vae).parent) if Path(vae).suffix else vae
        draft.put("autoencoder.weights", {"use": "hf", "path": folder})
        draft.note("mapped", "vae_checkpoint", vae, f"autoencoder.weights: {folder}")
    draft.move("sd_scale_factor", "autoencoder.scale_factor", float)
    kind = draft.pop("vae_type", str, "CogVideoX-VAE")
    if kind != "CogVideoX-VAE":
        raise FormatError(f"{draft.source}: vae_type is {kind!r}; expected 'CogVideoX-VAE'.")
    if (precision := draft.pop("vae_dtype")) is not None:
        draft.note("differs", "vae_dtype", precision, "the autoencoder has the recipe's dtype")
    encoder = draft.pop("t5_model_dir") or draft.pop("text_encoder")
    draft.recipe["text_encoder"] = {"use": "t5-xxl"}
    if encoder is None and first:
        encoder = str(Path(draft.recipe["predictor"]["weights"]["path"]).parent / "text_encoder")
        draft.note("stated", "text encoder", "none", f"text_encoder.weights: {encoder}, beside the predictor")
    if encoder is not None:
        draft.put("text_encoder.weights", {"use": "hf", "path": encoder})
        draft.put("text_encoder.tokenizer", str(Path(encoder).parent / "tokenizer"))
    draft.move("model_max_length", "text_encoder.max_length", whole)


def _video(draft: Draft) -> None:
    stride = draft.pop("frame_stride", whole, 1)
    text = "frames are picked at video.fps, whatever the rate of a clip"
    draft.note("differs", "frame_stride", stride, text)
    draft.drop(["num_latent_frames"], "follows from video.frames")
    buckets = draft.pop("bucket_config", lambda value: value)
    if buckets is not None:
        draft.put("loader.buckets", buckets)
        draft.note("mapped", "bucket_config", ", ".join(map(str, buckets)), "loader.buckets")
        draft.drop(["image_size", "num_frames", "batch_size"], "each bucket states its own")
        return
    size = draft.pop("image_size", lambda value: value)
    if size is None:
        raise FormatError(f"{draft.source}: states neither image_size nor bucket_config. Add one.")
    height, width = size if isinstance(size, list) else (size, size)
    frames = draft.pop("num_frames", whole, 16)
    draft.recipe["video"] = {"frames": frames, "height": whole(height), "width": whole(width)}
    draft.note("mapped", "image_size", size, f"video: {height}x{width}")
    draft.note("mapped", "num_frames", frames, f"video.frames: {frames}")
    step = 16 if "1.5" in draft.recipe["predictor"]["use"] else 8
    if (frames - 1) % step and (frames - 1) % 4 == 0:
        draft.put("predictor.card", {"frames_step": 4})
        text = f"predictor.card.frames_step: 4; it was released for {step}*N+1"
        draft.note("stated", "frames", frames, text)


def _noise(draft: Draft) -> None:
    prediction = "v" if draft.pop("v_pred", bool, False) else "epsilon"
    zero = draft.pop("rescale_betas_zero_snr", bool, False)
    draft.recipe["scheduler"] = {"use": "ddim", "prediction": prediction, "zero_snr": zero}
    draft.note("mapped", "v_pred", prediction == "v", f"scheduler.prediction: {prediction}")
    draft.note("mapped", "rescale_betas_zero_snr", zero, f"scheduler.zero_snr: {zero}")
    draft.move("beta_start", "scheduler.beta_start", float, 0.0001)
    draft.move("beta_end", "scheduler.beta_end", float, 0.02)
    draft.move("snr_shift_scale", "scheduler.snr_shift", float, 1.0)
    schedule, kind = draft.pop("noise_schedule", str, "linear"), draft.pop("noise_scheduler", str, "ddpm")
    if (schedule, kind) != ("quad", "ddpm"):
        raise FormatError(
            f"{draft.source}: noise_scheduler {kind!r} with noise_schedule {schedule!r}; this "
            "family has 'ddpm' with 'quad' only."
        )
    draft.note(
        "mapped",
        "noise_scheduler, noise_schedule",
        [kind, schedule],
        "scheduler: ddim, whose betas these are",
    )


def _data(draft: Draft) -> None:
    table = draft.pop("csv_path")
    draft.recipe["dataset"] = {"use": "csv"}
    if table is None:
        raise FormatError(
            f"{draft.source}: names no clips; MindOne takes them from the command line. Give the command "
            "that names this file, or --also csv_path=FILE --also video_folder=FOLDER."
        )
    draft.put("dataset.path", table)
    draft.note("mapped", "csv_path", table, f"dataset.path: {table}")
    draft.move("video_folder", "dataset.root")
    draft.move("video_column", "dataset.video_column", default="video")
    draft.move("caption_column", "dataset.caption_column", default="caption")
    draft.drop(
        ["text_embed_folder", "vae_latent_folder"],
        "its files are not read; clips are encoded as they come",
    )
    if "buckets" not in draft.recipe.get("loader", {}):
        draft.move("batch_size", "loader.batch", whole, 10)
    draft.move("num_parallel_workers", "loader.workers", whole, 12)


def _training(draft: Draft, rows: int | None) -> None:
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
        steps = max(rows // (draft.recipe["loader"]["batch"] * accumulate), 1) * epochs
        draft.note("differs", "epochs", epochs, f"task.steps: {steps}, of {rows} rows on one device")
    draft.put("task.steps", steps)
    _schedule(draft, steps)
    clips = draft.pop("clip_grad", bool, False)
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
    name = draft.pop("optim", str, "adamw")
    if name not in OPTIMIZERS:
        raise FormatError(f"{draft.source}: optim is {name!r}; {', '.join(OPTIMIZERS)} have a counterpart.")
    draft.recipe["optimizer"] = {"use": "adamw"}
    draft.note("mapped", "optim", name, "adamw")
    draft.move("start_learning_rate", "optimizer.lr", float, 1e-5)
    betas = draft.pop("betas", lambda value: [float(item) for item in value], [0.9, 0.999])
    draft.put("optimizer.betas", betas)
    draft.note("mapped", "betas", betas, "optimizer.betas")
    draft.move("optim_eps", "optimizer.eps", _first, 1e-8)
    draft.move("weight_decay", "optimizer.weight_decay", float, 1e-6)
    draft.put("optimizer.decay_norms", False)


def _schedule(draft: Draft, steps: int) -> None:
    name, last = draft.pop("scheduler", str, "cosine_decay"), draft.pop("end_learning_rate", float, 1e-7)
    if name not in SCHEDULES:
        raise FormatError(f"{draft.source}: scheduler is {name!r}; expected {', '.join(SCHEDULES)}.")
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


def _parallel(draft: Draft) -> None:
    shards = draft.pop("sequence_parallel_shards", whole, 1)
    enabled = draft.pop("enable_sequence_parallelism", _flag, False)
    several = draft.pop("use_parallel", _flag, False)
    stage = draft.pop("zero_stage", whole, 0)
    if several:
        use = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}.get(stage, "ddp")
        draft.strategy(use)
        draft.note("mapped", "use_parallel, zero_stage", [several, stage], f"parallel: {use}")
    if enabled and shards > 1:
        draft.strategy("cp", ulysses=shards)
        draft.note("mapped", "sequence_parallel_shards", shards, f"parallel: cp, ulysses: {shards}")
    if draft.pop("use_recompute", _flag, False):
        draft.strategy("recompute")
        draft.note("mapped", "use_recompute", True, "parallel: recompute")


def _rest(draft: Draft) -> None:
    draft.move("log_interval", "task.log_every", whole)
    if "i2v" in draft.recipe["predictor"]["use"]:
        draft.put("task.image_dropout", 0.0)
        draft.put("task.image_noise", None)
        draft.note("stated", "first frames", "neither dropped nor noised", "task.image_dropout, image_noise")
        scale = draft.pop("sd_encode_scale_factor", float)
        if scale is not None:
            draft.note(
                "differs", "sd_encode_scale_factor", scale, "image latents are scaled as in the release"
            )
    draft.drop(["image_to_video"], "follows from the predictor")
    draft.drop(["group_strategy"], "norms and biases are not decayed (optimizer.decay_norms)")
    draft.drop(["resume"], "convert its weights with `cvx convert`; the optimizer's state starts anew")
    draft.drop([name for name in draft.given if name.startswith("val") and name != "value"], EVALUATE)
    draft.drop(["num_eval_timesteps"], EVALUATE)
    draft.drop(READING, "rows are read ahead by the loader")
    draft.drop(MINDSPORE, "belongs to MindSpore, or changes no result")
    decay = draft.pop("ema_decay", float, 0.9999)
    if draft.pop("use_ema", _flag, False):
        draft.put("task.ema", {"decay": decay})
        draft.note("mapped", "use_ema, ema_decay", [True, decay], f"task.ema.decay: {decay}")
    draft.drop(
        ["loss_scaler_type", "init_loss_scale", "native_precision", "amp_level"],
        "no loss is scaled: use bfloat16",
    )
    ratios: Any = draft.pop("mask_ratios", lambda value: value)
    if ratios is not None and ratios != {"identity": 1.0}:
        draft.note(
            "no counterpart", "mask_ratios", ratios, "no frames are masked: every clip is trained whole"
        )


def _first(value: Any) -> float:
    """Return a number that may be given as a list of one."""
    return float(value[0] if isinstance(value, list) else value)


def _flag(value: Any) -> bool:
    """Return a truth value, also of the text that a command line gives."""
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "false", "1", "0"):
        return str(value).lower() in ("true", "1")
    raise ValueError
