"""Bucket tables as recipes state them: names, pairs that pass clips on, and what is refused."""

import pytest
from pydantic import ValidationError

from cvx_core.bucket_config import read_table, resolution, smallest_batch
from cvx_core.run_config import LoaderConfig


@pytest.mark.parametrize(
    ("name", "area", "size"),
    [("480p", 480 * 480 * 16 / 9, None), ("512", 512 * 512, None), ("480x720", 480 * 720, (480, 720))],
)
def test_a_resolution_is_lines_a_side_or_a_size(name, area, size):
    one = resolution(name)
    assert (one.area, one.size) == (area, size)


def test_a_side_is_an_area_in_any_aspect():
    assert resolution("256").sized(1.0, 16) == (256, 256)
    height, width = resolution("512").sized(16 / 9, 16)
    assert (height, width) == (384, 688)


def test_sides_may_be_numbers_in_a_file(tmp_path):
    file = tmp_path / "bucket.yaml"
    file.write_text('bucket_config:\n  256: {45: [1.0, 54]}\n  "512": {45: [0.3, 14]}\n')
    assert read_table(str(file)) == {"256": {45: (1.0, 54)}, "512": {45: (0.3, 14)}}


def test_nothing_stays_in_a_bucket_of_no_batch():
    loader = LoaderConfig.model_validate(
        {"buckets": {"1024": {45: [0.0, 0]}, "512": {45: [0.3, 14], 93: [1.0, 4]}}}
    )
    assert loader.buckets is not None
    assert loader.buckets["1024"][45] == (0.0, 0)
    assert loader.batch == smallest_batch(loader.buckets) == 4


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"512": {45: [0.3, 0]}}, r"512.45: keeps clips \(keep_prob 0.3\) in batches of 0"),
        ({"512": {45: [0.0, 0]}}, r"every bucket is \[0.0, 0\]"),
        ({"512": {45: [0.0, -1]}}, "greater than or equal to 0"),
        ({"0": {45: [1.0, 1]}}, "no resolution '0'; expected lines such as 480p, a side such as 512"),
        ({"5k": {45: [1.0, 1]}}, "no resolution '5k'"),
        ({"512": {}}, "has no bucket"),
    ],
)
def test_a_table_that_means_nothing_is_refused(table, says):
    with pytest.raises(ValidationError, match=says):
        LoaderConfig.model_validate({"buckets": table})
