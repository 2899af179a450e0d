"""MindSpeed-MM: `torchrun ... pretrain_sora.py` with a model json, a data json and Megatron's flags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvx_core.errors import FormatError
from cvx_io.atomic import read_json
from cvx_io.importing import release
from cvx_io.importing.draft import Draft, whole
from cvx_io.importing.launcher import Launch
from cvx_io.importing.mindspeed_mesh import mesh
from cvx_io.importing.mindspeed_rest import rest
from cvx_io.importing.mindspeed_training import DATA, MODEL, batches, image, lora, training
from cvx_io.importing.shell import find_file

RELEASES = {
    ("t2v", 1): "cogvideox-5b",
    ("i2v", 1): "cogvideox-5b-i2v",
    ("t2v", 2): "cogvideox-1.5-5b",
    ("i2v", 2): "cogvideox-1.5-5b-i2v",
}
SIZES = {"num_layers": 42, "num_heads": 48, "head_dim": 64, "time_embed_dim": 512, "text_hidden_size": 4096}
OURS = {"time_embed_dim": "temb_dim", "text_hidden_size": "text_dim"}
GEOMETRY = {
    "num_frames": "frames",
    "max_height": "height",
    "max_width": "width",
    "train_fps": "fps",
    "skip_frame_num": "skip",
}
OLDER = {"train_fps": "fps"}
"""Names of these in older versions of the data json."""


def flat(data: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return nested settings under dotted names."""
    result: dict[str, Any] = {}
    for key, value in data.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result


def import_mindspeed(draft: Draft, script: Path, launch: Launch) -> None:
    """Fill a draft from the flags of a command of MindSpeed-MM, and the json files that they name."""
    for flag, prefix in (("--mm-model", MODEL), ("--mm-data", DATA)):
        path = draft.pop(flag)
        if path is None:
            raise FormatError(f"{draft.source}: gives no {flag}. Add it.")
        found = find_file(path, script)
        draft.given |= flat(read_json(found), prefix)
        draft.note("mapped", flag, path, f"read from {found}")
    draft.recipe |= {"device": "npu", "predictor": {}}
    _precision(draft)
    draft.move("--save", "output", default="runs/mindspeed")
    draft.move("--seed", "seed", whole, 1234)
    task = draft.pop(f"{MODEL}task", str, "t2v")
    _video(draft)
    name = _predictor(draft, task)
    _encoders(draft)
    _diffusion(draft)
    _data(draft)
    draft.put("task.use", "train")
    batches(draft, mesh(draft, launch, script))
    training(draft)
    lora(draft)
    if task == "i2v":
        image(draft)
    release.frames(draft, name, [draft.recipe["video"]["frames"]])
    rest(draft)
    launch.leave(draft)


def _precision(draft: Draft) -> None:
    """Put the precision; the source updates what it trains in float32, whatever it computes in."""
    given = [flag for flag in ("--bf16", "--fp16") if draft.pop(flag, bool, False)]
    if not given:
        draft.put("dtype", "float32")
        draft.note("stated", "--bf16, --fp16", "none", "dtype: float32")
        return
    release.dtype(draft, given[0], given[0].removeprefix("--"), ", optimizer.master_weights: float32")
    draft.put("optimizer.master_weights", "float32")


def _video(draft: Draft) -> None:
    place = f"{DATA}dataset_param.preprocess_parameters."
    for theirs, ours in GEOMETRY.items():
        name = next((name for name in (theirs, OLDER.get(theirs, "")) if draft.has(f"{place}{name}")), theirs)
        if draft.move(f"{place}{name}", f"video.{ours}", whole) is None:
            raise FormatError(
                f"{draft.source}: the data json states no {theirs} in preprocess_parameters. Add it there."
            )
    draft.put("video.rule", "cogvideox")
    draft.put("video.short", "repeat")
    draft.note("stated", "frames of a clip", "", "video.rule: cogvideox, video.short: repeat")
    draft.drop(
        [f"{place}{name}" for name in ("video_processor_type", "video_reader_type", "data_process_type")],
        "video.rule; the reader is found",
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
    for key, usual in SIZES.items():
        value = draft.pop(f"{place}{key}", whole, usual)
        if value != usual:
            draft.put(f"predictor.{OURS.get(key, key)}", value)
            text = f"predictor.{OURS.get(key, key)}: {value}, where the release has {usual}"
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
    if kind == "feature" or draft.pop(f"{place}use_feature_data", bool, False):
        raise FormatError(
            f"{draft.source}: the data json is of stored features, and those of MindSpeed-MM are not "
            "read. Name the clips they are made of, and use the task `precompute`."
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
