"""What MindOne's version of CogVideoX-factory adds: ZeRO, sequence parallelism, buckets and caches."""

from __future__ import annotations

from pathlib import Path

from cvx_core.bucket_config import read_table
from cvx_core.errors import FormatError
from cvx_io.importing import release
from cvx_io.importing.draft import Draft, flag, whole
from cvx_io.importing.launcher import STAGES, Launch
from cvx_io.importing.shell import find_file

OWN = (
    "--mindspore_mode", "--jit_level", "--amp_level", "--distributed", "--zero_stage", "--vae_cache",
    "--embeddings_cache", "--enable_sequence_parallelism", "--sequence_parallel_shards", "--dynamic_shape",
    "--bucket_config", "--max_sequence_length", "--fa_gradient_checkpointing", "--lora_rank",
    "--transformer_config",
)  # fmt: skip
"""Flags by which its commands are told from those of CogVideoX-factory itself."""
TEXT_LENGTH = 226
"""Its text tokens where nothing is stated, for all releases."""


def is_mindone(draft: Draft, launch: Launch) -> bool:
    """Tell whether a command is of MindOne's version, and say so."""
    found = launch.kind == "msrun" or draft.has(*OWN)
    if found:
        draft.put("device", "npu")
        draft.note("stated", "device", "Ascend", "device: npu")
    return found


def mesh(draft: Draft, launch: Launch) -> int:
    """Add the strategies; return how many ranks read different rows."""
    count = launch.devices(draft)
    is_distributed = draft.pop("--distributed", flag, False)
    stage = draft.pop("--zero_stage", whole, 0)
    enabled = draft.pop("--enable_sequence_parallelism", flag, False)
    shards = draft.pop("--sequence_parallel_shards", whole, 1)
    if count > 1 and not is_distributed:
        raise FormatError(
            f"{draft.source}: {count} processes are started without --distributed, so that each trains by "
            "itself. Add it, or state --also worker_num=1."
        )
    if stage not in STAGES:
        raise FormatError(f"{draft.source}: --zero_stage is {stage}; expected 0, 1, 2 or 3.")
    draft.note("mapped", "--distributed", is_distributed, "follows from the number of devices")
    use = STAGES[stage] if count > 1 else "nothing with one device"
    draft.note("mapped", "--zero_stage", stage, f"parallel: {use}" if count > 1 else use)
    if count > 1:
        draft.strategy(use)
    return count // sequence(draft, enabled, shards, count, "--")


def sequence(draft: Draft, enabled: bool, shards: int, count: int, prefix: str) -> int:
    """Add the strategy by which devices share a sequence; return how many do. prefix: of the settings."""
    names = f"{prefix}enable_sequence_parallelism, {prefix}sequence_parallel_shards"
    size = shards if enabled and count > 1 else 1
    if count % size:
        raise FormatError(f"{draft.source}: {names}: {count} devices are no multiple of {size} shards.")
    if size > 1:
        draft.strategy("cp", ulysses=size)
    text = f"parallel: cp, ulysses: {size}" if size > 1 else "nothing: it is off, or there is one device"
    draft.note("mapped", names, [enabled, shards], text)
    return size


def buckets(draft: Draft, script: Path, name: str) -> bool:
    """Put loader.buckets, where the source sorts clips by a bucket file; tell whether it does."""
    path = draft.pop("--bucket_config")
    if not path or draft.given.get("--vae_cache"):
        if path:
            draft.note("mapped", "--bucket_config", path, "nothing: with --vae_cache it is not read there")
        return False
    try:
        table = read_table(str(find_file(path, script)))
    except ValueError as error:
        raise FormatError(f"{draft.source}: --bucket_config {error}") from error
    plain = {size: {count: list(pair) for count, pair in counts.items()} for size, counts in table.items()}
    draft.put("loader.buckets", plain)
    draft.note("mapped", "--bucket_config", path, "loader.buckets, as the file states them")
    text = (
        "loader.aspects: seven aspect ratios; the source has a list of sizes for each resolution. Clips stay "
        "by keep_prob, and their frames are picked at video.fps; the source spreads them over the whole clip"
    )
    draft.note("differs", "sizes of a bucket", "", text)
    draft.drop(
        (
            "--height_buckets",
            "--width_buckets",
            "--frame_buckets",
            "--height",
            "--width",
            "--max_num_frames",
        ),
        "each bucket states its own",
    )
    release.frames(draft, name, [count for counts in plain.values() for count in counts])
    return True


def rest(draft: Draft, name: str) -> None:
    """Take what is left of its settings."""
    if draft.has("--transformer_config"):
        raise FormatError(
            f"{draft.source}: --transformer_config makes another model than {name}. Import without it, and "
            "state its sizes under `predictor`."
        )
    length = draft.pop("--max_sequence_length", whole)
    if length is None and draft.has("--embeddings_cache"):
        text = "as the model was released; the source takes the number that its cache was made with"
        draft.note("differs", "--max_sequence_length", "none", text)
    else:
        release.text_length(draft, "--max_sequence_length", name, length or TEXT_LENGTH)
    if draft.pop("--dynamic_shape", flag, False):
        draft.note("mapped", "--dynamic_shape", True, "nothing: a batch may have any size here")
    for cache in ("--vae_cache", "--embeddings_cache"):
        if not draft.pop(cache, flag, False):
            continue
        text = (
            "its .npy files are not read: clips and captions are encoded as they come, from dataset.root; "
            "the task `precompute` makes a cache of them, for dataset feature-cache"
        )
        draft.note("differs", cache, True, text)
        if cache == "--vae_cache" and "image_noise" in draft.recipe["task"]:
            draft.put("task.image_noise", None)
            draft.note("stated", "noise on the image", "none with --vae_cache", "task.image_noise: null")
    if draft.pop("--fa_gradient_checkpointing", flag, False):
        text = "no counterpart of its own; --gradient_checkpointing covers attention too"
        draft.note("no counterpart", "--fa_gradient_checkpointing", True, text)
    draft.drop(("--mindspore_mode", "--jit_level"), "belongs to MindSpore, and changes no result")
    draft.drop(("--amp_level",), "has effect there with float16 alone")
    draft.drop(("--transformer_ckpt_path",), "is read there with --transformer_config alone")
