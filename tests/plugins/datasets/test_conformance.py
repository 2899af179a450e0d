"""The dataset kit on every built-in dataset."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from cvx_core.testing import dataset, plugin
from cvx_io.cache.rows import Listed, Shared, write_rows


def clips(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def jsonl(folder: Path) -> dict[str, Path]:
    clips(folder, "a.mp4", "b.mp4", "b.png")
    records = [
        {"file": "a.mp4", "captions": "A"},
        {"file": "b.mp4", "captions": ["B", "C"], "image": "b.png"},
    ]
    (folder / "index.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"path": folder / "index.jsonl"}


def csv(folder: Path) -> dict[str, Path]:
    clips(folder, "a.mp4", "b.mp4")
    (folder / "index.csv").write_text('video,caption\na.mp4,"A, with a comma"\nb.mp4,B\n')
    return {"path": folder / "index.csv"}


def prompts_videos(folder: Path) -> dict[str, Path]:
    clips(folder, "a.mp4", "b.mp4")
    (folder / "prompts.txt").write_text("A\nB\n")
    (folder / "videos.txt").write_text("a.mp4\nb.mp4\n")
    return {"prompts": folder / "prompts.txt", "videos": folder / "videos.txt"}


def prompts(folder: Path) -> dict[str, Path]:
    clips(folder, "a.png", "b.png")
    (folder / "prompts.txt").write_text("A\nB\n")
    (folder / "images.txt").write_text("a.png\nb.png\n")
    return {"path": folder / "prompts.txt", "images_path": folder / "images.txt"}


def feature_cache(folder: Path) -> dict[str, Path]:
    shared = Shared({"frames": 9}, {"autoencoder.use": "a"}, {"text_encoder.use": "t"}, {}, 0.7)
    rows = [
        Listed(name, (f"a {name}",), {"video": f"/{name}.mp4"}, {"latent": name}, (name,), {"latent": name})
        for name in ("A", "B")
    ]
    write_rows(folder, "all", shared, rows)
    return {"path": folder}


def npz(folder: Path) -> dict[str, Path]:
    clips(folder, "a.npz", "b.npz")
    (folder / "index.csv").write_text("video,caption\na.mp4,A\nb.mp4,B\n")
    return {"path": folder / "index.csv", "latents": folder}


def annotation(folder: Path) -> dict[str, Path]:
    (folder / "nature").mkdir()
    clips(folder, "a.mp4", "nature/b.mp4")
    data = {"pixabay": {"city": [{"path": "a.mp4", "cap": "A"}], "nature": {"b": NATURE}}, "version": 2}
    (folder / "annotation.json").write_text(json.dumps(data))
    return {"path": folder / "annotation.json"}


NATURE = {"path": "nature/b.mp4", "cap": ["B", "C"], "resolution": {"height": 480, "width": 720}}


def pairs(folder: Path) -> dict[str, Path]:
    (folder / "clips" / "in").mkdir(parents=True)
    for name in ("a", "in/b"):
        clips(folder / "clips", f"{name}.mp4")
        (folder / "clips" / f"{name}.txt").write_text(f"caption of\n{name}\n")
    clips(folder / "clips", "notes.md")
    return {"path": folder / "clips"}


def hub(folder: Path) -> dict[str, Path]:
    (folder / "hub").mkdir()
    clips(folder / "hub", "a.mp4", "b.mp4")
    lines = [{"file_name": "a.mp4", "text": "A"}, {"file_name": "b.mp4", "text": "B", "source": "x"}]
    (folder / "hub/metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"path": folder / "hub"}


def hub_csv(folder: Path) -> dict[str, Path]:
    (folder / "hub").mkdir()
    clips(folder / "hub", "a.mp4", "b.mp4")
    (folder / "hub/metadata.csv").write_text("file_name,text\na.mp4,A\nb.mp4,B\n")
    return {"path": folder / "hub"}


def write_shard(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def shards(folder: Path) -> dict[str, Path]:
    (folder / "shards").mkdir()
    write_shard(folder / "shards/0.tar", {"x/a.mp4": b"?", "x/a.txt": b"A", "b.txt": b"B", "b.mp4": b"?"})
    write_shard(folder / "shards/1.tar", {"a.png": b"?", "a.txt": b"C"})
    return {"path": folder / "shards"}


test_plugin = plugin.suite("datasets")
test_datasets = (
    dataset.suite("jsonl", jsonl)
    + dataset.suite("csv", csv)
    + dataset.suite("prompts-videos", prompts_videos)
    + dataset.suite("annotation", annotation)
    + dataset.suite("folder", pairs)
    + dataset.suite("hf-folder", hub)
    + dataset.suite("webdataset", shards)
    + dataset.suite("prompts", prompts)
    + dataset.suite("synthetic", rows=3)
    + dataset.suite("feature-cache", feature_cache)
    + dataset.suite("npz-cache", npz)
)
