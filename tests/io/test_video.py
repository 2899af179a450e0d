"""Picking frames, fitting them to a size, and reading rows."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cvx_core import Registry
from cvx_core.errors import FormatError
from cvx_core.interfaces import Row
from cvx_io.video import ClipTooShort, Pick, fit, pick_frames, read_image, read_row


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def reader() -> Any:
    component = Registry.discover().get("reader", "pyav")
    assert component.config is not None
    return component.load()(component.config(), None)


def test_picking_at_the_source_rate_takes_every_frame() -> None:
    assert pick_frames(49, 8.0, Pick(49, 8)) == list(range(49))


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (30.0, 8, [0, 3, 7, 11, 15]),
        (29.97002997002997, 8, [0, 3, 7, 11, 14]),
        (24.0, 8, [0, 3, 6, 9, 12]),
        (8.0, 16, [0, 0, 1, 1, 2]),
        (23.976023976023978, 23.976023976, [0, 1, 2, 3, 4]),
    ],
)
def test_picking_takes_the_frame_shown_at_each_instant(
    source: float, target: float, expected: list[int]
) -> None:
    assert pick_frames(100, source, Pick(5, target)) == expected


@given(
    num_frames=st.integers(1, 400),
    source=st.sampled_from([8.0, 15.0, 23.976, 24.0, 25.0, 29.97, 30.0, 60.0]),
    target=st.sampled_from([4, 8, 12.5, 16, 30]),
    frames=st.integers(1, 81),
    start=st.sampled_from(["first", "center", "random"]),
    skip=st.integers(0, 5),
    short=st.sampled_from(["error", "repeat"]),
)
@settings(max_examples=150, deadline=None)
def test_picked_frames_ascend_within_the_clip_and_keep_time(
    num_frames: int, source: float, target: float, frames: int, start: Any, skip: int, short: Any
) -> None:
    pick = Pick(frames, target, start=start, skip=skip, short=short)
    try:
        found = pick_frames(num_frames, source, pick, generator())
    except ClipTooShort:
        needed = int((frames - 1) * Fraction(source).limit_denominator(1001) / Fraction(target)) + 1
        assert num_frames - 2 * skip < (needed if short == "error" else 1)
        return
    assert len(found) == frames
    assert found == sorted(found)
    assert found[0] >= skip
    assert found[-1] < num_frames - skip
    last = num_frames - skip - 1
    for k, index in enumerate(found):
        assert index == last or abs((index - found[0]) - k * source / target) < 1 + 1e-6


def test_start_places_the_stretch() -> None:
    assert pick_frames(20, 8.0, Pick(4, 8, start="center")) == [8, 9, 10, 11]
    firsts = {pick_frames(20, 8.0, Pick(4, 8, start="random"), generator(i))[0] for i in range(200)}
    assert firsts == set(range(17)), "every possible start occurs"
    again = [pick_frames(20, 8.0, Pick(4, 8, start="random"), generator(3)) for _ in range(2)]
    assert again[0] == again[1]
    with pytest.raises(ValueError, match="generator"):
        pick_frames(20, 8.0, Pick(4, 8, start="random"))


def test_a_short_clip_is_an_error_with_numbers_or_repeats_its_last_frame() -> None:
    with pytest.raises(ClipTooShort, match=r"has 10 frames at 30 fps; 5 frames at 8 fps need 16"):
        pick_frames(10, 30.0, Pick(5, 8))
    assert pick_frames(10, 30.0, Pick(5, 8, short="repeat")) == [0, 3, 7, 9, 9]
    with pytest.raises(ClipTooShort):
        pick_frames(6, 8.0, Pick(5, 8, skip=3, short="repeat"))


def test_rule_cogvideox_picks_what_the_reference_does(shared: Path) -> None:
    golden = json.loads((shared / "fixtures/megatron/golden/cogvideo_frame_selection.json").read_text())
    assert len(golden["cases"]) > 30
    for case in golden["cases"]:
        pick = Pick(case["num_frames"], case["train_fps"], "cogvideox", skip=case["skip_frame_num"])
        if isinstance(case["selected"], str):
            with pytest.raises(FormatError):
                pick_frames(case["source_frames"], case["source_fps"], pick)
        else:
            assert pick_frames(case["source_frames"], case["source_fps"], pick) == case["selected"], case


def test_frames_of_the_right_size_keep_their_values() -> None:
    frames = torch.randint(256, (11, 16, 24, 3), generator=generator()).to(torch.uint8)
    video = fit(frames.numpy(), 16, 24)
    assert (video.shape, video.dtype) == ((3, 11, 16, 24), torch.float32)
    assert (video.min(), video.max()) == (-1, 1)
    assert torch.equal(((video + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0), frames)


@pytest.mark.parametrize(("size", "box"), [((20, 24), (2, 18, 0, 24)), ((16, 30), (0, 16, 3, 27))])
def test_the_centre_is_kept_where_only_a_crop_is_needed(
    size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    top, bottom, left, right = box
    assert torch.equal(fit(frames, 16, 24), fit(frames[:, top:bottom, left:right], 16, 24))


def test_resizing_keeps_the_aspect_and_stays_in_range() -> None:
    y, x = np.mgrid[:90, :160]
    disc = ((y - 44.5) ** 2 + (x - 79.5) ** 2 < 30**2)[None, ..., None]
    video = fit(np.where(disc, 255, 0).astype(np.uint8).repeat(3, axis=-1), 36, 48)
    inside = video[0, 0] > 0
    assert abs(int(inside.any(0).sum()) - int(inside.any(1).sum())) <= 1, "the disc stays round"
    assert video.min() >= -1
    assert video.max() <= 1


def test_resizing_equals_the_image_librarys_bicubic() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    video = fit(pixels[None], 30, 40)
    for channel in range(3):
        plane = Image.fromarray(pixels[..., channel].astype(np.float32))
        expected = np.asarray(plane.resize((40, 30), Image.Resampling.BICUBIC)).clip(0, 255)
        np.testing.assert_allclose((video[channel, 0].numpy() + 1) * 127.5, expected, atol=1e-3)


def test_fit_refuses_other_layouts() -> None:
    with pytest.raises(ValueError, match=r"\(F,H,W,3\) uint8, got \(2, 3, 4, 4\)"):
        fit(np.zeros((2, 3, 4, 4), np.uint8), 4, 4)


def test_images_are_upright_and_without_alpha(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a clockwise quarter turn
    Image.fromarray(np.rot90(pixels)).convert("RGBA").save(tmp_path / "a.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "a.png", 16, 24), fit(pixels[None], 16, 24)[:, 0])


def test_a_file_that_is_no_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(FormatError, match=r"a.png: cannot be read as an image"):
        read_image(tmp_path / "a.png", 16, 24)
    with pytest.raises(FormatError, match=r"row 'x': .*a.png"):
        read_row(Row("x", image=tmp_path / "a.png"), None, Pick(1, 8), 16, 24)


def test_a_row_gives_its_clip_and_first_frame(reader: Any, shared: Path) -> None:
    row = Row("hiker", video=shared / "data/clips/hiker_tiny.mp4")
    video, image, _ = read_row(row, reader, Pick(13, 4), 240, 368)
    clip = reader.open(row.video)
    assert torch.equal(video, fit(clip.frames(range(0, 26, 2)), 240, 368))
    assert torch.equal(image, video[:, 0])


def test_a_row_with_an_image_keeps_it(tmp_path: Path) -> None:
    Image.new("RGB", (24, 16), (255, 0, 0)).save(tmp_path / "red.png")
    row = Row("x", image=tmp_path / "red.png", make=lambda f, h, w: np.zeros((f, h, w, 3), np.uint8))
    video, image, _ = read_row(row, None, Pick(2, 8), 16, 24)
    assert video is not None
    assert image is not None
    assert (video == -1).all()
    assert image.mean((1, 2)).tolist() == [1, -1, -1]


def test_errors_name_the_row_and_the_file(reader: Any, shared: Path, tmp_path: Path) -> None:
    clip = shared / "data/clips/hiker_tiny.mp4"
    with pytest.raises(ClipTooShort, match=r"row 'long': .*hiker_tiny.mp4 has 49 frames .* need 50"):
        read_row(Row("long", video=clip), reader, Pick(50, 8), 16, 24)
    (tmp_path / "bad.mp4").write_text("no video")
    with pytest.raises(FormatError, match=r"row 'bad': .*bad.mp4"):
        read_row(Row("bad", video=tmp_path / "bad.mp4"), reader, Pick(1, 8), 16, 24)


SLOWING = [0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 1.5, 2.5]
"""A clip that gets slower: 8 frames, the last of them shown for 0.4 s."""


@pytest.mark.parametrize(
    ("pick", "expected"),
    [
        (Pick(6, 10), [0, 1, 2, 3, 3, 4]),
        (Pick(6, 2), [0, 4, 5, 6, 6, 7]),
        (Pick(3, 5, start="center"), [3, 4, 4]),  # starts 0 to 6 leave 0.4 s; that in the middle is taken
        (Pick(3, 2, skip=1), [1, 4, 5]),
        (Pick(4, 1, short="repeat"), [0, 5, 6, 7]),
    ],
)
def test_frames_of_a_varying_rate_are_picked_by_their_times(pick: Pick, expected: list[int]) -> None:
    assert pick_frames(8, 2.5, pick, times=SLOWING) == expected


def test_a_short_clip_of_a_varying_rate_says_its_length() -> None:
    with pytest.raises(ClipTooShort, match=r"8 frames in 2.9 s, at a rate that varies; 4 frames.*3 s"):
        pick_frames(8, 2.5, Pick(4, 1), times=SLOWING)
    with pytest.raises(ClipTooShort, match="4 frames skipped at both ends"):
        pick_frames(8, 2.5, Pick(1, 1, skip=4, short="repeat"), times=SLOWING)


@given(
    num_frames=st.integers(1, 60),
    source=st.sampled_from([8.0, 15.0, 24.0, 25.0, 30.0, 60.0]),
    target=st.sampled_from([8.0, 16.0, 24.0]),
    frames=st.integers(1, 17),
    start=st.sampled_from(["first", "center", "random"]),
    skip=st.integers(0, 3),
    short=st.sampled_from(["error", "repeat"]),
)
@settings(max_examples=150, deadline=None)
def test_times_of_a_steady_rate_pick_what_the_rate_picks(
    num_frames: int, source: float, target: float, frames: int, start: Any, skip: int, short: Any
) -> None:
    pick = Pick(frames, target, start=start, skip=skip, short=short)
    times = [k / source for k in range(num_frames)]
    found: list[Any] = []
    for known in (None, times):
        try:
            found.append(pick_frames(num_frames, source, pick, generator(), known))
        except ClipTooShort:
            found.append("too short")
    assert found[0] == found[1]
