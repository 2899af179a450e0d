"""Training on several buckets, end to end: mixed sizes, lengths and stills; the account; what is refused."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from cvx_core import FormatError, RecipeError, Registry
from cvx_core.recipe import parse
from cvx_core.schema import schema
from cvx_core.spec import resolve
from cvx_io.video_write import write_mp4
from tests.plugins.tasks.test_train import same, state_of

BUCKETS = {"32x48": {9: [0.5, 2], 1: [1.0, 2]}, "48x32": {5: [1.0, 1]}, "16x16": {5: [1.0, 2]}}


@pytest.fixture
def mixed(tiny, tmp_path):
    """The tiny recipe on clips of several sizes and lengths, stills, and one that is damaged."""
    records = []
    sizes = [(32, 48), (48, 32), (64, 96), (32, 48)]
    for i in range(11):
        height, width = sizes[i % len(sizes)]
        video = np.random.default_rng(i).integers(0, 255, (5 if i % 3 else 12, height, width, 3), np.uint8)
        write_mp4(tmp_path / f"{i}.mp4", video, 8)
        records.append({"file": f"{i}.mp4", "captions": f"clip {i}", "id": f"c{i}"})
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        records.append({"file": f"{i}.png", "captions": f"still {i}", "id": f"s{i}"})
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "0.mp4").read_bytes()[:300])
    records.append({"file": "cut.mp4", "captions": "cut", "id": "cut"})
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tiny["dataset"] = {"use": "jsonl", "path": "clips.jsonl"}
    tiny["loader"] = {"buckets": BUCKETS, "max_drop": 0.3}
    tiny["video"] = {"fps": 8}
    return tiny


def test_a_run_over_several_buckets_resumes_bit_for_bit_and_accounts_for_every_clip(
    mixed, launch, log_of, tmp_path
):
    mixed["task"] |= {"steps": 10}
    whole = launch(mixed, output=str(tmp_path / "whole"))
    launch(mixed, output=str(tmp_path / "parts"), **{"task.stop_at": 4})
    parts = launch(mixed, output=str(tmp_path / "parts"), **{"task.resume": "auto"})
    assert (whole / "log.jsonl").read_bytes() == (parts / "log.jsonl").read_bytes()
    last = "checkpoints/step-00000010"
    assert same(state_of(whole / last), state_of(parts / last))
    account = json.loads((whole / "data.json").read_text())
    assert len(account["clips"]) == account["rows"] == 16 == account["kept"] + account["dropped"]
    fates = {clip["row"]: clip for clip in account["clips"]}
    assert fates["cut"]["reason"] == "unreadable"
    assert "cut.mp4" in fates["cut"]["detail"]
    assert {fates[f"s{i}"]["bucket"] for i in range(4)} == {"32x48/1x32x48"}
    assert {"48x32/5x48x32", "16x16/5x16x16"} < account["buckets"].keys()
    read = {row for line in log_of(whole) for row in line["rows"]}
    assert any(row.startswith("s") for row in read)
    assert any(row.startswith("c") for row in read)


def test_an_image_condition_follows_the_bucket(mixed, launch, log_of):
    mixed["predictor"] |= {"image_condition": True, "patch_t": 2}
    assert len(log_of(launch(mixed))) == 4


def test_too_many_dropped_clips_stop_the_run_before_the_first_step(mixed, launch, tmp_path):
    mixed["loader"]["max_drop"] = 0.0
    with pytest.raises(FormatError, match=r"loader.max_drop allows 0%") as error:
        launch(mixed, output=str(tmp_path / "out"))
    assert "1 unreadable: first 'cut'" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_limit_holds_without_buckets_too(tiny, launch):
    tiny["loader"] = {"batch": 4, "max_drop": 0.2}
    with pytest.raises(FormatError, match=r"2 of 6 rows \(33%\)"):
        launch(tiny)


def test_a_bucket_file_is_read_and_written_out(tiny, tmp_path):
    (tmp_path / "bucket.yaml").write_text('bucket_config:\n  "480p": {37: [0.4, 8], 1: [1.0, 16]}\n')
    tiny["loader"], tiny["video"] = {"buckets": "bucket.yaml"}, {"fps": 8}
    spec = resolve(parse(yaml.safe_dump(tiny), base=tmp_path))
    assert spec.loader.buckets == {"480p": {37: (0.4, 8), 1: (1.0, 16)}}
    assert spec.loader.batch == 8
    assert resolve(parse(spec.to_yaml())).digest == spec.digest


@pytest.mark.parametrize(
    ("loader", "error"),
    [
        ({"buckets": {"32x48": {8: [1.0, 2]}}}, "buckets.32x48.8: video.frames: got 8; .* takes 4"),
        ({"buckets": {"32x40": {9: [1.0, 2]}}}, "buckets.32x40.9: video.width: got 40; .* multiples of 16"),
        (
            {"buckets": {"32x48": {9: [1.5, 2]}}},
            r"32x48\[9\]\[0\]: got 1.5; expected .* less than or equal to 1",
        ),
        ({"buckets": {"32x48": {9: 2}}}, "got 2; expected a list"),
        ({"buckets": {"big": {9: [1, 2]}}}, "no resolution 'big'; expected lines such as 480p"),
        ({"buckets": {}}, "has no bucket"),
        ({"buckets": "absent.yaml"}, "no such file or folder"),
        ({"buckets": {"32x48": {9: [1, 2]}}, "batch": 3}, "each bucket states its own"),
        ({"buckets": {"32x48": {9: [1, 2]}}, "aspects": ["16x9"]}, "no aspect ratio '16x9'"),
        ({"aspects": ["16:9"]}, "aspects: has no effect without loader.buckets"),
        ({"enlarge": 2.0}, "enlarge: has no effect without loader.buckets"),
    ],
)
def test_a_loader_that_cannot_be_is_refused_in_words(loader, error, tiny, tmp_path):
    tiny["loader"], tiny["video"] = loader, {"fps": 8}
    with pytest.raises(RecipeError, match=error):
        resolve(parse(yaml.safe_dump(tiny), base=tmp_path))


def test_settings_that_buckets_leave_without_meaning_are_refused(tiny):
    tiny["loader"] = {"buckets": {"32x48": {9: [1, 2]}}}
    with pytest.raises(RecipeError, match=r"state what video.frames states"):
        resolve(parse(yaml.safe_dump(tiny)))
    tiny["video"], tiny["task"]["memory"] = {"fps": 8}, True
    with pytest.raises(RecipeError, match="keeps one latent per row"):
        resolve(parse(yaml.safe_dump(tiny)))


def test_editors_may_offer_a_path_or_a_table():
    loader = schema(Registry.discover())["properties"]["loader"]
    kinds = {kind["type"] for kind in loader["properties"]["buckets"]["anyOf"]}
    assert kinds == {"object", "string", "null"}


def test_buckets_do_not_sort_what_is_encoded(tiny, tmp_path):
    (tmp_path / "cache").mkdir()
    tiny["dataset"] = {"use": "feature-cache", "path": "cache"}
    tiny["loader"], tiny["video"] = {"buckets": {"32x48": {9: [1.0, 2]}}}, {"fps": 8}
    with pytest.raises(RecipeError, match="dataset 'feature-cache' gives encoded ones"):
        resolve(parse(yaml.safe_dump(tiny), base=tmp_path))


def test_clips_pass_a_bucket_without_batches_in_training_and_in_validation(mixed, launch, log_of, tmp_path):
    mixed["loader"]["buckets"] = {**BUCKETS, "64x96": {9: [0.0, 0], 5: [0.0, 0]}}
    video = np.random.default_rng(99).integers(0, 255, (5, 64, 96, 3), np.uint8)
    write_mp4(tmp_path / "held.mp4", video, 8)
    (tmp_path / "held.jsonl").write_text(json.dumps({"file": "held.mp4", "captions": "held"}) + "\n")
    mixed["task"]["validation"] = {
        "every": 4,
        "loss": {"dataset": {"use": "jsonl", "path": "held.jsonl"}},
    }
    whole = launch(mixed, output=str(tmp_path / "train"))
    buckets = json.loads((whole / "data.json").read_text())["buckets"]
    assert buckets
    assert not any(name.startswith("64x96") for name in buckets)
    losses = [line["validation/loss"] for line in log_of(whole) if "validation/loss" in line]
    assert len(losses) == 2
