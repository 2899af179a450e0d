"""MindSpeed-MM: `torchrun ... pretrain_sora.py` with a model json, a data json and Megatron's flags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvx_core.errors import FormatError
from cvx_io.atomic import read_json
from cvx_io.importing.draft import Draft, whole, words
from cvx_io.importing.shell import find_file

MODEL, DATA = "model.", "data."
RELEASES = {
    ("t2v", 1): "cogvideox-5b",
    ("i2v", 1): "cogvideox-5b-i2v",
    ("t2v", 2): "cogvideox-1.5-5b",
    ("i2v", 2): "cogvideox-1.5-5b-i2v",
}
SIZES = {"num_layers": 42, "num_heads": 48, "head_dim": 64, "time_embed_dim": 512, "text_hidden_size": 4096}
OURS = {"time_embed_dim": "temb_dim", "text_hidden_size": "text_dim"}
SCHEDULES = {"constant": "constant", "linear": "linear", "cosine": "cosine"}
GEOMETRY = {
    "num_frames": "frames",
    "max_height": "height",
    "max_width": "width",
    "train_fps": "fps",
    "skip_frame_num": "skip",
}
LORA_TARGETS = {"proj_qkv": ["to_q", "to_k", "to_v"], "proj_out": ["to_out.0"]}
FIXED: Mapping[str, Any] = {
    "predictor.attention_bias": True,
    "predictor.activation_fn": "gelu-approximate",
    "predictor.norm_type": "qk_ln",
    "predictor.norm_elementwise_affine": True,
    "predictor.norm_eps": 1e-5,
    "predictor.concat_text_embed": True,
    "predictor.dropout": 0.0,
    "predictor.out_channels": 16,
    "predictor.interpolation_scale": [1.0, 1.0, 1.0],
    "text_encoder.use_attention_mask": False,
    "ae.z_channels": 16,
    "ae.num_res_blocks": 3,
    "ae.hidden_size_mult": [1, 2, 2, 4],
    "ae.use_quant_layer": False,
    "ae.encoder_gather_norm": True,
    "ae.decoder_gather_norm": True,
    "ae.i2v_processor.noised_image_all_concat": False,
}
"""Values of the model json that this family has one of here."""
BOOKKEEPING = (
    "frames", "resolution", "allow_internal_format", "load_video_features", "load_text_features",
    "predictor.model_id", "predictor.from_pretrained", "predictor.dtype", "predictor.input_size",
    "predictor.patch_size", "predictor.in_channels", "predictor.use_rope", "predictor.num_embeds_ada_norm",
    "predictor.cross_attention_dim", "predictor.caption_channels", "diffusion.model_id",
    "text_encoder.model_id", "text_encoder.hub_backend", "text_encoder.dtype",
    "text_encoder.low_cpu_mem_usage",
    "ae.model_id", "ae.dtype", "ae.conv_padding", "ae.i2v_processor.processor_id",
)  # fmt: skip
"""Settings that follow from others here, or have no effect there."""


def flat(data: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return nested settings under dotted names."""
    result: dict[str, Any] = {}
    for key, value in data.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result


def import_mindspeed(draft: Draft, script: Path, launcher: dict[str, object]) -> None:
    """Fill a draft from the flags of a command of MindSpeed-MM, and the json files that they name."""
    for flag, prefix in (("--mm-model", MODEL), ("--mm-data", DATA)):
        path = draft.pop(flag)
        if path is None:
            raise FormatError(f"{draft.source}: gives no {flag}. Add it.")
        found = find_file(path, script)
        draft.given |= flat(read_json(found), prefix)
        draft.note("mapped", flag, path, f"read from {found}")
    draft.recipe |= {"device": "npu", "predictor": {}}
    for flag, dtype in (("--bf16", "bfloat16"), ("--fp16", "float16")):
        if draft.pop(flag, bool, False):
            draft.put("dtype", dtype)
            text = f"dtype: {dtype}, of the trained weights too; the source updates them in float32"
            draft.note("differs", flag, True, text)
    draft.recipe.setdefault("dtype", "float32")
    draft.move("--save", "output", default="runs/mindspeed")
    draft.move("--seed", "seed", whole, 1234)
    task = draft.pop(f"{MODEL}task", str, "t2v")
    _video(draft)
    name = _predictor(draft, task)
    _encoders(draft)
    _diffusion(draft)
    _data(draft)
    draft.put("task.use", "train")
    _batches(draft, _mesh(draft, launcher))
    _training(draft)
    _lora(draft)
    if task == "i2v":
        _image(draft)
    _legal_frames(draft, name)
    _bookkeeping(draft)


def _video(draft: Draft) -> None:
    place = f"{DATA}dataset_param.preprocess_parameters."
    for theirs, ours in GEOMETRY.items():
        if draft.move(f"{place}{theirs}", f"video.{ours}", whole) is None:
            raise FormatError(f"{draft.source}: the data json states no {theirs} in preprocess_parameters.")
    draft.put("video.rule", "cogvideox")
    draft.put("video.short", "repeat")
    draft.note("stated", "frames of a clip", "", "video.rule: cogvideox, video.short: repeat")
    draft.drop(
        [f"{place}video_processor_type", f"{place}video_reader_type"], "video.rule; the reader is found"
    )
    draft.drop([name for name in draft.given if name.startswith(f"{place}train_pipeline")], "is empty there")


def _predictor(draft: Draft, task: str) -> str:
    place = f"{MODEL}predictor."
    patch = 2 if draft.pop(f"{place}patch_type", str, "2D") == "3D" else 1
    if (task, patch) not in RELEASES:
        raise FormatError(f"{draft.source}: task is {task!r} in the model json; expected t2v or i2v.")
    name = RELEASES[task, patch]
    draft.put("predictor.use", name)
    draft.note("mapped", f"{place}patch_type, {MODEL}task", [patch, task], f"predictor: {name}")
    for key, release in SIZES.items():
        value = draft.pop(f"{place}{key}", whole, release)
        if value != release:
            draft.put(f"predictor.{OURS.get(key, key)}", value)
            text = f"predictor.{OURS.get(key, key)}: {value}, where the release has {release}"
            draft.note("mapped", f"{place}{key}", value, text)
        else:
            draft.note("mapped", f"{place}{key}", value, f"as in {name}")
    length = draft.pop(f"{place}text_length", whole)
    if length is not None:
        if length != (226 if patch == 1 else 224):
            draft.put("predictor.text_length", length)
        draft.note("mapped", f"{place}text_length", length, "predictor.text_length")
    learned = draft.pop(f"{place}learnable_pos_embed", bool, False)
    if learned != (name == "cogvideox-5b-i2v"):
        draft.note(
            "differs",
            f"{place}learnable_pos_embed",
            learned,
            f"as {name} was released, which has {'none' if learned else 'a learned table'}",
        )
    else:
        draft.note("mapped", f"{place}learnable_pos_embed", learned, f"as in {name}")
    ofs = draft.pop(f"{place}ofs_embed_dim", lambda value: value)
    draft.note("mapped", f"{place}ofs_embed_dim", ofs, f"as in {name}")
    load = draft.pop("--load")
    base = draft.pop("--load-base-model")
    path = base or load
    if path is not None:
        draft.put("predictor.weights", {"use": "megatron", "path": path})
        draft.note("mapped", "--load-base-model" if base else "--load", path, "predictor.weights")
    if base is not None and load is not None:
        draft.note("no counterpart", "--load", load, "is a LoRA to go on from; convert it with `cvx convert`")
    return name


def _encoders(draft: Draft) -> None:
    text, ae = f"{MODEL}text_encoder.", f"{MODEL}ae."
    tokens = f"{DATA}dataset_param.tokenizer_config."
    draft.recipe["text_encoder"] = {"use": "t5-xxl", "unconditional": "zeros"}
    draft.note("stated", "no text", "embeddings of zero", "text_encoder.unconditional: zeros")
    encoder = draft.pop(f"{text}from_pretrained")
    if encoder is not None:
        draft.put("text_encoder.weights", {"use": "hf", "path": encoder})
        draft.note("mapped", f"{text}from_pretrained", encoder, "text_encoder.weights")
    draft.move(f"{tokens}from_pretrained", "text_encoder.tokenizer")
    length = draft.pop(f"{tokens}model_max_length", whole)
    if length is not None:
        draft.note("mapped", f"{tokens}model_max_length", length, "follows predictor.text_length")
    draft.drop([f"{tokens}hub_backend", f"{tokens}autotokenizer_name"], "is found in the tokenizer's folder")
    rate = draft.pop(f"{text}ucg_rate", float, 0.0)
    draft.put("task.text_dropout", rate)
    draft.note("mapped", f"{text}ucg_rate", rate, f"task.text_dropout: {rate}")
    if draft.pop(f"{text}load_in_8bit", bool, False):
        draft.note("differs", f"{text}load_in_8bit", True, "the text encoder keeps the recipe's precision")
    draft.recipe["autoencoder"] = {"use": "cogvideox-vae", "scale_factor": 0.7}
    path = draft.pop(f"{ae}from_pretrained")
    if path is not None:
        draft.put("autoencoder.weights", {"use": "sat", "path": path})
        draft.note("mapped", f"{ae}from_pretrained", path, "autoencoder.weights")
    if draft.pop(f"{ae}use_tiling", bool, False):
        draft.put("autoencoder.tile", {"height": 240, "width": 360})
        draft.note("mapped", f"{ae}use_tiling", True, "autoencoder.tile: 240x360")
    if draft.pop(f"{ae}cp_size", whole, 1) > 1:
        draft.strategy("vae-cp")
        draft.note("mapped", f"{ae}cp_size", "", "parallel: vae-cp, over the ranks that see the same rows")


def _diffusion(draft: Draft) -> None:
    place = f"{MODEL}diffusion."
    sampler = f"{place}sigma_sampler_config."
    shift = draft.pop(f"{sampler}discretization_config.shift_scale", float, 1.0)
    other = draft.pop(f"{place}denoiser_config.discretization_config.shift_scale", float, shift)
    if other != shift:
        raise FormatError(f"{draft.source}: the model json states two shift_scale, {shift} and {other}.")
    uniform = draft.pop(f"{sampler}uniform_sampling", bool, False)
    draft.recipe["scheduler"] = {
        "use": "ddim",
        "snr_shift": shift,
        "draw": "interval" if uniform else "uniform",
    }
    draft.note(
        "mapped", f"{sampler}discretization_config.shift_scale", shift, f"scheduler.snr_shift: {shift}"
    )
    draw = draft.recipe["scheduler"]["draw"]
    draft.note("mapped", f"{sampler}uniform_sampling", uniform, f"scheduler.draw: {draw}")
    draft.move(f"{sampler}group_num", "scheduler.groups", whole)
    for name in (f"{sampler}num_idx", f"{place}denoiser_config.num_idx"):
        if draft.pop(name, whole, 1000) != 1000:
            raise FormatError(f"{draft.source}: {name} is not 1000, the only number of timesteps here.")
    draft.drop([f"{place}denoiser_config.quantize_c_noise"], "timesteps are whole numbers here")


def _data(draft: Draft) -> None:
    place = f"{DATA}dataset_param."
    kind = draft.pop(f"{place}dataset_type", str, "t2v")
    if kind == "feature":
        raise FormatError(
            f"{draft.source}: dataset_type is 'feature'; stored features of MindSpeed-MM are not read. Name "
            "the clips they are made of, and use the task `precompute`."
        )
    combine = draft.pop(f"{place}basic_parameters.data_storage_mode", str, "standard") == "combine"
    draft.recipe["dataset"] = {"use": "jsonl"}
    draft.move(f"{place}basic_parameters.data_path", "dataset.path")
    draft.move(f"{place}basic_parameters.data_folder", "dataset.root")
    draft.put("dataset.video_key", "path" if combine else "file")
    draft.put("dataset.caption_key", "cap" if combine else "captions")
    draft.note(
        "mapped",
        f"{place}basic_parameters.data_storage_mode",
        "combine" if combine else "standard",
        "dataset.video_key, caption_key",
    )
    loader = f"{DATA}dataloader_param."
    draft.move(f"{loader}shuffle", "loader.shuffle", bool, True)
    draft.move(f"{loader}drop_last", "loader.drop_last", bool, True)
    draft.move("--num-workers", "loader.workers", whole, 2)
    names = (
        "dataloader_mode",
        "sampler_type",
        "pin_memory",
        "group_frame",
        "group_resolution",
        "prefetch_factor",
    )
    draft.drop([f"{loader}{name}" for name in names], "rows are shared out and read ahead by the loader")
    draft.drop(
        [f"{place}use_text_processer", f"{place}enable_text_preprocessing"],
        "captions are tokenised as they are",
    )


def _mesh(draft: Draft, launcher: dict[str, object]) -> int:
    """Add the strategies; return how many ranks read different rows."""
    world = whole(launcher.pop("--nproc_per_node", 1)) * whole(launcher.pop("--nnodes", 1))
    for name, value in launcher.items():
        draft.note("no counterpart", f"torchrun {name}", value, "is the launcher's own")
    sizes = {axis: draft.pop(f"--{axis}-model-parallel-size", whole, 1) for axis in ("tensor", "pipeline")}
    context = draft.pop("--context-parallel-size", whole, 1)
    shared = sizes["tensor"] * sizes["pipeline"] * context
    if world % shared:
        raise FormatError(
            f"{draft.source}: {world} devices are no multiple of tp x pp x cp, which is {shared}."
        )
    draft.note(
        "mapped",
        "torchrun",
        f"{world} devices",
        f"start it with torchrun --nproc-per-node {world} -m cvx_core.run RECIPE",
    )
    _data_axis(draft, world // shared)
    sequence = draft.pop("--sequence-parallel", bool, False)
    if sizes["tensor"] > 1:
        draft.strategy("tp", size=sizes["tensor"], sequence=sequence)
    draft.note(
        "mapped",
        "--tensor-model-parallel-size, --sequence-parallel",
        [sizes["tensor"], sequence],
        "parallel: tp" if sizes["tensor"] > 1 else "nothing with one rank",
    )
    stages = draft.pop(f"{MODEL}predictor.pipeline_num_layers", lambda value: value)
    if sizes["pipeline"] > 1:
        draft.strategy("pp", **({"stages": stages} if stages else {"size": sizes["pipeline"]}))
    draft.note(
        "mapped",
        "--pipeline-model-parallel-size",
        sizes["pipeline"],
        "parallel: pp" if sizes["pipeline"] > 1 else "nothing with one rank",
    )
    _context(draft, context)
    if draft.pop(f"{MODEL}enable_encoder_dp", bool, False):
        alone = sizes["tensor"] * context == 1
        if not alone:
            draft.strategy("encoder-dp")
        draft.note(
            "mapped",
            f"{MODEL}enable_encoder_dp",
            True,
            "nothing: no ranks see the same rows" if alone else "parallel: encoder-dp",
        )
    rounds = draft.pop(f"{MODEL}encoder_offload_interval", whole, 1)
    if rounds > 1:
        draft.strategy("interleave", rounds=rounds)
        draft.note(
            "mapped", f"{MODEL}encoder_offload_interval", rounds, f"parallel: interleave, rounds: {rounds}"
        )
    _recompute(draft)
    return world // shared


def _data_axis(draft: Draft, ranks: int) -> None:
    sharded = draft.pop("--use-distributed-optimizer", bool, False)
    if draft.has("--layerzero"):
        draft.drop(
            ["--layerzero"],
            "parallel: layerzero, with the fields of its own file to be set there: it is not read",
        )
        draft.strategy("layerzero", zero3_size=min(8, ranks))
        draft.drop(["--layerzero-config"], "set zero3_size, param_dtype and the others under `parallel`")
    elif ranks > 1:
        draft.strategy("zero1" if sharded else "ddp")
        draft.note(
            "mapped", "--use-distributed-optimizer", sharded, f"parallel: {'zero1' if sharded else 'ddp'}"
        )
    elif sharded:
        draft.note("mapped", "--use-distributed-optimizer", True, "nothing with one data rank")


def _context(draft: Draft, size: int) -> None:
    algorithm = draft.pop("--context-parallel-algo", str, "ulysses_cp_algo")
    inner = draft.pop("--ulysses-degree-in-cp", whole, 1)
    if size > 1:
        fields = {
            "ulysses_cp_algo": {"ulysses": size},
            "megatron_cp_algo": {"ring": size},
            "hybrid_cp_algo": {"ulysses": inner, "ring": size // inner},
        }
        if algorithm not in fields:
            raise FormatError(
                f"{draft.source}: --context-parallel-algo is {algorithm!r}; expected {', '.join(fields)}."
            )
        draft.strategy("cp", **fields[algorithm])
    draft.note(
        "mapped",
        "--context-parallel-size, --context-parallel-algo",
        [size, algorithm],
        "parallel: cp" if size > 1 else "nothing with one rank",
    )
    draft.drop(
        ["--cp-window-size", "--use-cp-send-recv-overlap", "--megatron-cp-in-bnsd", "--attention-mask-type"],
        "one ring, overlapped; it changes no result",
    )


def _recompute(draft: Draft) -> None:
    granularity = draft.pop("--recompute-granularity")
    method, layers = draft.pop("--recompute-method"), draft.pop("--recompute-num-layers", whole)
    if granularity is not None:
        draft.strategy("recompute", mode="full" if granularity == "full" else "selective")
        draft.note(
            "mapped",
            "--recompute-granularity, --recompute-method, --recompute-num-layers",
            [granularity, method, layers],
            "parallel: recompute, of every block; results are the same",
        )


def _batches(draft: Draft, ranks: int) -> None:
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


def _training(draft: Draft) -> None:
    steps = draft.move("--train-iters", "task.steps", whole)
    if steps is None:
        raise FormatError(f"{draft.source}: gives no --train-iters. Add it.")
    draft.recipe["optimizer"] = {"use": "adamw"}
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
    style, least = draft.pop("--lr-decay-style", str, "linear"), draft.pop("--min-lr", float, 0.0)
    if style not in SCHEDULES:
        raise FormatError(f"{draft.source}: --lr-decay-style is {style!r}; expected {', '.join(SCHEDULES)}.")
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


def _lora(draft: Draft) -> None:
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


def _image(draft: Draft) -> None:
    place = f"{MODEL}ae.i2v_processor."
    draft.move(f"{place}noised_image_dropout", "task.image_dropout", float, 0.0)
    noised = draft.pop(f"{place}noised_image_input", bool, True)
    draft.put("task.image_noise", [-3.0, 0.5] if noised else None)
    draft.note("mapped", f"{place}noised_image_input", noised, "task.image_noise")


def _legal_frames(draft: Draft, name: str) -> None:
    """Allow frame counts that the release was not made for, where the source trains on them."""
    frames, step = draft.recipe["video"]["frames"], 16 if "1.5" in name else 8
    if (frames - 1) % step and (frames - 1) % 4 == 0:
        draft.put("predictor.card", {"frames_step": 4})
        draft.note(
            "stated", "frames", frames, f"predictor.card.frames_step: 4; {name} was released for {step}*N+1"
        )


def _bookkeeping(draft: Draft) -> None:
    for name, only in FIXED.items():
        given = draft.has(f"{MODEL}{name}")
        value = draft.pop(f"{MODEL}{name}", lambda value: value, only)
        if value != only:
            raise FormatError(
                f"{draft.source}: {name} is {value!r} in the model json; it is always {only!r} here."
            )
        if given:
            draft.note("mapped", f"{MODEL}{name}", value, "the only value here")
    for name in (f"{MODEL}{name}" for name in BOOKKEEPING):
        if draft.has(name):
            value = draft.pop(name, lambda value: value)
            draft.note("mapped", name, value, "nothing: it follows from others, or has no effect there")
    blocks = (f"{MODEL}ae.encoder_", f"{MODEL}ae.decoder_")
    for name in [name for name in draft.given if name.startswith(blocks)]:
        value = draft.pop(name, lambda value: value)
        draft.note("mapped", name, value, "the blocks of cogvideox-vae, whatever is named")
    draft.drop(
        [
            "--mm-tool",
            "--qk-layernorm",
            "--no-gradient-accumulation-fusion",
            "--overlap-grad-reduce",
            "--overlap-param-gather",
            "--distributed-backend",
            "--ckpt-format",
            "--optimization-level",
            "--use-multiparameter-pipeline-model-parallel",
        ],
        "is not needed, and changes no result",
    )
    draft.drop(["--allow-tf32"], "changes nothing in bfloat16; float32 is computed in float32")
    draft.drop(["--no-load-optim", "--no-load-rng"], "weights alone are read; task.resume goes on from a run")
    draft.drop(["--no-save-optim", "--no-save-rng"], "checkpoints are always complete")
    draft.drop(["--eval-interval", "--eval-iters"], "measure with the task `evaluate`")
