"""Geometry and clips of CogVideoX-factory's commands."""

from __future__ import annotations

from pathlib import Path

from cvx_io.importing import release
from cvx_io.importing.draft import Draft, numbers, whole


def geometry(draft: Draft, batch: int, of_mindone: bool) -> None:
    """One bucket is the recipe's video; several become loader.buckets."""
    _default_sizes(draft, of_mindone)
    heights = draft.pop("--height_buckets", numbers) or [draft.pop("--height", whole, 480)]
    widths = draft.pop("--width_buckets", numbers) or [draft.pop("--width", whole, 720)]
    draft.drop(("--height", "--width"), "--height_buckets and --width_buckets hold, as in the source")
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
    release.frames(draft, Path(draft.recipe["model"]).name, frames)
    draft.note(
        "differs",
        "frames of a clip",
        "",
        "are picked at video.fps; the source spreads them over the whole clip, whatever its rate",
    )
    _reshaping(draft)
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


def _default_sizes(draft: Draft, of_mindone: bool) -> None:
    """Say what the source does where it is given no sizes."""
    missing = [side for side in ("height", "width") if not draft.has(f"--{side}_buckets")]
    if not missing:
        return
    height, width = draft.given.get("--height", 480), draft.given.get("--width", 720)
    text = f"video: {height}x{width}; "
    if of_mindone:
        is_same = (str(height), str(width)) == ("480", "720")
        text += (
            "the source's one default size" if is_same else "the source takes 480x720, and reads no --height"
        )
    else:
        is_same = False
        text += (
            "the source has a list of sizes by default, takes the nearest for each clip, and reads neither "
            "--height nor --width: name sizes with --height_buckets and --width_buckets"
        )
    names = ", ".join(f"--{side}_buckets" for side in missing)
    draft.note("stated" if is_same else "differs", names, "none", text)


def _reshaping(draft: Draft) -> None:
    mode = draft.pop("--video_reshape_mode")
    text = "clips are scaled to cover the size, and cut in the centre"
    theirs = {None: "; the source stretches them to it", "center": ""}.get(
        mode, "; the source cuts them at random"
    )
    draft.note("differs" if theirs else "mapped", "--video_reshape_mode", mode, text + theirs)


def clips(draft: Draft) -> None:
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
