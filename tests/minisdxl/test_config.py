"""Configurations: the official training sizes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from minisdxl.config import SDXL_BASE


def test_the_40_sizes_of_training() -> None:
    sizes = SDXL_BASE.buckets
    assert len(set(sizes)) == len(sizes) == 40
    for width, height in sizes:
        assert SDXL_BASE.picture_size((width, height)) == (width, height)
        assert width % 64 == height % 64 == 0
        assert 0.88 < width * height / 1024**2 <= 1.04  # "as close to 1024^2 as possible"
        assert SDXL_BASE.nearest_bucket((width, height)) == (width, height)
    # Portrait and landscape mirror each other, but for one.
    assert {size for size in sizes if size[::-1] not in sizes} == {(1344, 704)}
    assert type(SDXL_BASE).from_dict(SDXL_BASE.to_dict()) == SDXL_BASE


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((512, 512), (1024, 1024)), ((1920, 1080), (1344, 768)), ((704, 1344), (704, 1408)), ((64, 4096), (512, 2048))],
)
def test_nearest_bucket(size: tuple[int, int], nearest: tuple[int, int]) -> None:
    ratios = {bucket: bucket[0] / bucket[1] / (size[0] / size[1]) for bucket in SDXL_BASE.buckets}
    assert min(ratios, key=lambda bucket: max(ratios[bucket], 1 / ratios[bucket])) == nearest
    assert SDXL_BASE.nearest_bucket(size) == nearest


@pytest.mark.parametrize("buckets", [((64,),), ((64, 64.0),), ((64, 0),), (("64", "64"),)])
def test_buckets_that_are_no_sizes_are_refused(buckets: Any) -> None:
    with pytest.raises(ValueError, match=r"training bucket is .*, expected a width and a height"):
        replace(SDXL_BASE, buckets=buckets)
