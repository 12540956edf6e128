"""Tensors to pictures and back, and the check for numbers that are not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from minisdxl.images import check_finite, to_image, to_pixels


def drawing() -> Image.Image:
    """A picture that is neither square nor of a size that is asked for."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((150, 90), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_any_image_mode_becomes_pixels(mode: str) -> None:
    values = to_pixels(drawing().convert(mode), (64, 32))
    assert values.shape == (1, 3, 32, 64)
    assert -1 <= values.min() < values.max() <= 1


def test_pixels_come_back() -> None:
    image = drawing()
    assert np.array_equal(np.asarray(to_image(to_pixels(image, image.size)[0])), np.asarray(image))


def test_finite_counts_what_is_not() -> None:
    with pytest.raises(ArithmeticError, match=r"the part gave 2 of 3 values"):
        check_finite("the part", torch.tensor([1.0, float("nan"), float("inf")]))
