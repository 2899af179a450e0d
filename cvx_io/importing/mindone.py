"""MindOne (examples/opensora_hpcai, CogVideoX): a training yaml, and the flags of a command that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cvx_core.errors import FormatError
from cvx_io.importing import release
from cvx_io.importing.draft import Draft, flag, whole
from cvx_io.importing.factory_mindone import sequence
from cvx_io.importing.factory_optimizer import whole_parameters
from cvx_io.importing.launcher import STAGES, Launch
from cvx_io.importing.mindone_training import training

VERSIONS = {
    "CogVideoX-2B": "cogvideox-2b",
    "CogVideoX-5B": "cogvideox-5b",
    "CogVideoX-5B-I2V": "cogvideox-5b-i2v",
    "CogVideoX-5B-v1.5": "cogvideox-1.5-5b",
    "CogVideoX-5B-v1.5-I2V": "cogvideox-1.5-5b-i2v",
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
EMPTY = "empty_text.npz"
"""The source's file of what stands for no text, in the folder of embeddings."""
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


def import_mindone(draft: Draft, rows: int | None, launch: Launch | None) -> None:
    """Fill a draft from the settings of a training yaml.

    rows: clips, where the source counts epochs; launch: how the command that names the yaml is started.
    """
    version = draft.choose("model_version", VERSIONS)
    predictor = VERSIONS[str(version)]
    draft.recipe |= {"device": "npu", "predictor": {"use": predictor}}
    draft.note("mapped", "model_version", version, f"predictor: {predictor}")
    release.dtype(draft, "dtype", draft.choose("dtype", release.PRECISIONS, "fp16") or "", ", of all weights")
    draft.move("output_path", "output", default="output")
    draft.move("seed", "seed", whole, 3407)
    _weights(draft)
    ranks = _mesh(draft, launch)
    _video(draft)
    _noise(draft)
    _data(draft)
    training(draft, rows, ranks)
    _lora(draft)
    whole_parameters(draft, draft.recipe["optimizer"]["use"], "optim")
    _rest(draft)
    if launch is not None:
        launch.leave(draft)


def _weights(draft: Draft) -> None:
    files = draft.pop("pretrained_model_path", lambda value: value)
    first = files[0] if isinstance(files, list) else files
    if first:
        if Path(str(first)).suffix == ".ckpt":
            raise FormatError(
                f"{draft.source}: pretrained_model_path is {first}, a checkpoint of MindSpore, which is not "
                "read. Name the released model.safetensors files."
            )
        folder = str(Path(str(first)).parent) if Path(str(first)).suffix else str(first)
        draft.put("predictor.weights", {"use": "hf", "path": folder})
        draft.note("mapped", "pretrained_model_path", files, f"predictor.weights: {folder}")
    vae = draft.pop("vae_checkpoint")
    draft.recipe["autoencoder"] = {"use": "cogvideox-vae"}
    if vae:
        folder = str(Path(vae).parent) if Path(vae).suffix else vae
        draft.put("autoencoder.weights", {"use": "hf", "path": folder})
        draft.note("mapped", "vae_checkpoint", vae, f"autoencoder.weights: {folder}")
    draft.move("sd_scale_factor", "autoencoder.scale_factor", float)
    draft.choose("vae_type", ("CogVideoX-VAE",), "CogVideoX-VAE")
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
    length = draft.pop("model_max_length", whole)
    if length is not None:
        release.text_length(draft, "model_max_length", draft.recipe["predictor"]["use"], length)


def _video(draft: Draft) -> None:
    stride = draft.pop("frame_stride", whole, 1)
    text = (
        "frames are picked at video.fps from the first on; the source takes every one of so many, whatever "
        "the rate of a clip, from a random start"
    )
    draft.note("differs", "frame_stride", stride, text)
    name = draft.recipe["predictor"]["use"]
    buckets = draft.pop("bucket_config", lambda value: value)
    if buckets is not None:
        draft.put("loader.buckets", buckets)
        draft.note("mapped", "bucket_config", ", ".join(map(str, buckets)), "loader.buckets")
        names = ["image_size", "num_frames", "num_latent_frames", "batch_size"]
        draft.drop(names, "each bucket states its own")
        release.frames(draft, name, [whole(count) for counts in buckets.values() for count in counts])
        return
    size = draft.pop("image_size", lambda value: value)
    if size is None:
        raise FormatError(f"{draft.source}: states neither image_size nor bucket_config. Add one.")
    height, width = size if isinstance(size, list) else (size, size)
    frames = draft.pop("num_frames", whole, 16)
    _latent_frames(draft, frames)
    draft.recipe["video"] = {"frames": frames, "height": whole(height), "width": whole(width)}
    draft.note("mapped", "image_size", size, f"video: {height}x{width}")
    draft.note("mapped", "num_frames", frames, f"video.frames: {frames}")
    release.frames(draft, name, [frames])


def _latent_frames(draft: Draft, frames: int) -> None:
    """Compare the two counts, of which the source takes that of latents where it reads such from files."""
    count = draft.pop("num_latent_frames", whole)
    if count is None:
        return
    if draft.has("vae_latent_folder") and count != (frames - 1) // 4 + 1:
        raise FormatError(
            f"{draft.source}: num_latent_frames is {count}, and num_frames {frames} makes "
            f"{(frames - 1) // 4 + 1}; with vae_latent_folder the source takes the former. State --also "
            f"num_frames={4 * count - 3}, or another num_latent_frames."
        )
    draft.note("mapped", "num_latent_frames", count, "follows from video.frames")


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
    if table is None:
        raise FormatError(
            f"{draft.source}: names no clips; MindOne takes them from the command line. Give the command "
            "that names this file, or --also csv_path=FILE --also video_folder=FOLDER."
        )
    latents, texts = draft.pop("vae_latent_folder"), draft.pop("text_embed_folder")
    is_image = "i2v" in draft.recipe["predictor"]["use"]
    is_cached = latents is not None and not is_image and "buckets" not in draft.recipe.get("loader", {})
    draft.recipe["dataset"] = {"use": "npz-cache" if is_cached else "csv", "path": table}
    draft.note("mapped", "csv_path", table, f"dataset.path: {table}")
    if is_cached:
        _cached(draft, str(latents), texts)
    else:
        draft.move("video_folder", "dataset.root")
        for name, folder in (("vae_latent_folder", latents), ("text_embed_folder", texts)):
            if folder is not None:
                text = "its files are not read: clips and captions are encoded as they come"
                draft.note("differs", name, folder, text)
    draft.move("video_column", "dataset.video_column", default="video")
    draft.move("caption_column", "dataset.caption_column", default="caption")
    if "buckets" not in draft.recipe.get("loader", {}):
        draft.move("batch_size", "loader.batch", whole, 10)
    draft.move("num_parallel_workers", "loader.workers", whole, 12)


def _cached(draft: Draft, latents: str, texts: str | None) -> None:
    """Train from latents, and embeddings where there are such, that the source has kept."""
    draft.recipe["dataset"] |= {"latents": latents, "fps": "ignore"}
    draft.note("mapped", "vae_latent_folder", latents, "dataset: npz-cache, latents; its clips are not read")
    draft.note("stated", "fps of the latents", "is not compared", "dataset.fps: ignore")
    if texts is not None:
        draft.put("dataset.texts", texts)
        draft.note("mapped", "text_embed_folder", texts, "dataset.texts")
        if float(draft.given.get("text_drop_prob", 0)) > 0:
            empty = str(Path(texts) / EMPTY)
            draft.put("dataset.unconditional", empty)
            draft.note("stated", "text dropout", EMPTY, f"dataset.unconditional: {empty}")
    draft.drop(["video_folder"], "clips are not read: their latents are")


def _lora(draft: Draft) -> None:
    rank = draft.pop("lora_dim", whole)
    if rank is None:
        return
    draft.recipe["adapter"] = {"use": "lora", "rank": rank, "alpha": float(rank), "targets": TARGETS}
    draft.put("task.export", {"use": "diffusers-lora"})
    text = (
        f"adapter: lora, rank {rank}, alpha {rank}, on {', '.join(TARGETS)} of every block; where the source "
        "adapts other layers, name them in adapter.targets"
    )
    draft.note("differs", "lora_dim", rank, text)


def _mesh(draft: Draft, launch: Launch | None) -> int:
    """Add the strategies; return how many ranks read different rows."""
    count = launch.devices(draft) if launch is not None else 1
    shards = draft.pop("sequence_parallel_shards", whole, 1)
    enabled = draft.pop("enable_sequence_parallelism", flag, False)
    several = draft.pop("use_parallel", flag, False)
    stage = draft.pop("zero_stage", whole, 0)
    if count > 1 and not several:
        raise FormatError(
            f"{draft.source}: {count} processes are started without use_parallel, so that each trains by "
            "itself. State --also use_parallel=True, or --also worker_num=1."
        )
    if stage not in STAGES:
        raise FormatError(f"{draft.source}: zero_stage is {stage}; expected 0, 1, 2 or 3.")
    if several:
        draft.strategy(STAGES[stage])
    text = f"parallel: {STAGES[stage]}" if several else "nothing on one device"
    draft.note("mapped", "use_parallel, zero_stage", [several, stage], text)
    if launch is None and several:
        # Only the command says how many there are; a yaml alone can still say how they share a sequence.
        count = shards if enabled else 1
    ranks = count // sequence(draft, enabled, shards, count, "")
    if draft.pop("use_recompute", flag, False):
        draft.strategy("recompute")
        draft.note("mapped", "use_recompute", True, "parallel: recompute")
    draft.drop(["num_recompute_blocks"], "every block is recomputed, or none; it changes no result")
    return ranks


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
    text = "optimizer.decay_norms: false; the source goes by names, and may decay norms as well"
    draft.note("differs", "group_strategy", draft.pop("group_strategy"), text)
    draft.drop(["resume"], "convert its weights with `cvx convert`; the optimizer's state starts anew")
    draft.drop([name for name in draft.given if name.startswith("val") and name != "value"], EVALUATE)
    draft.drop(["num_eval_timesteps"], EVALUATE)
    draft.drop(READING, "rows are read ahead by the loader")
    draft.drop(MINDSPORE, "belongs to MindSpore, or changes no result")
    decay = draft.pop("ema_decay", float, 0.9999)
    if draft.pop("use_ema", flag, False):
        draft.put("task.ema", {"decay": decay})
        draft.note("mapped", "use_ema, ema_decay", [True, decay], f"task.ema.decay: {decay}")
    draft.drop(
        ["loss_scaler_type", "init_loss_scale", "native_precision", "amp_level"],
        "no loss is scaled",
    )
    ratios: Any = draft.pop("mask_ratios", lambda value: value)
    if ratios is not None and ratios != {"identity": 1.0}:
        draft.note(
            "no counterpart", "mask_ratios", ratios, "no frames are masked: every clip is trained whole"
        )
