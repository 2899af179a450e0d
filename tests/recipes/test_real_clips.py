"""Real clips, end to end: 480x720 and 240x368 H.264, VP9 at 30 fps -> train -> resume -> sample -> mp4."""

import json
from pathlib import Path

import av
import pytest

from cvx_core import run

HERE = Path(__file__).parent / "clips"
CAPTIONS = {
    "hiker.mp4": "a hiker on a mountain",
    "horse.mp4": "a horse in a field",
    "train_running.mp4": "a running train",
    "hiker_tiny.mp4": "a small hiker",
    "gallery.webm": "people in a gallery",
}


@pytest.fixture
def clips(shared, tmp_path):
    """Overrides that make a recipe train on the real clips."""
    index = tmp_path / "clips.jsonl"
    index.write_text("".join(json.dumps({"file": f, "captions": c}) + "\n" for f, c in CAPTIONS.items()))
    return [f"dataset.path={index}", f"dataset.root={shared / 'data/clips'}", f"output={tmp_path / 'train'}"]


def launch(recipe, *overrides):
    assert run.main([str(recipe), *(part for override in overrides for part in ("--set", override))]) == 0


def first_frame(shared, path):
    with av.open(str(shared / "data/clips/hiker.mp4")) as container:
        next(container.decode(video=0)).to_image().save(path)


@pytest.mark.parametrize("variant", ["1.0-t2v", "1.0-i2v", "1.5-t2v", "1.5-i2v"])
def test_clips_to_a_trained_model_to_a_video(variant, clips, shared, tmp_path):
    memory = ["task.memory=true", "task.image_noise=null"]
    launch(HERE / f"{variant}.yaml", *clips, *memory, "task.stop_at=40")
    launch(HERE / f"{variant}.yaml", *clips, *memory, "task.resume=auto")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "train/log.jsonl").read_text().splitlines()]
    assert len(losses) == 80
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    dataset = "prompts: [a hiker on a mountain]"
    if variant.endswith("i2v"):
        first_frame(shared, tmp_path / "first.png")
        dataset += ", images: [first.png]"
    (tmp_path / "sample.yaml").write_text(
        f"model: train/model\noutput: out\nvideo: {{frames: 9, height: 48, width: 64, fps: 8}}\n"
        f"dataset: {{use: prompts, {dataset}}}\ntask: {{use: sample, steps: 4}}\ndevice: cpu\n"
    )
    launch(tmp_path / "sample.yaml")
    [video] = (tmp_path / "out").glob("*.mp4")
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (64, 48, 8)
        assert sum(1 for _ in container.decode(video=0)) == 9


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_training_decodes_the_clips_anew_with_either_reader(reader, clips, tmp_path):
    if reader == "decord":
        pytest.importorskip("decord", reason="decord has no wheel for this machine")
    launch(HERE / "1.5-i2v.yaml", *clips, f"reader.use={reader}", "task.steps=2", "task.export=null",
           "task.export_whole=false", "task.warmup=0")  # fmt: skip
    assert len((tmp_path / "train/log.jsonl").read_text().splitlines()) == 2


def test_both_readers_train_on_the_same_pixels(clips, tmp_path):
    pytest.importorskip("decord", reason="decord has no wheel for this machine")
    logs = []
    for reader in ("pyav", "decord"):
        options = ["task.steps=1", "task.export=null", "task.export_whole=false", "task.warmup=0"]
        launch(
            HERE / "1.0-t2v.yaml", *clips[:2], f"output={tmp_path / reader}", f"reader.use={reader}", *options
        )
        logs.append((tmp_path / reader / "log.jsonl").read_text())
    assert logs[0] == logs[1]
