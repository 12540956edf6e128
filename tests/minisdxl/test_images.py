"""Pictures of every mode of Pillow, against what numpy makes of their numbers."""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from minisdxl.images import check_finite, to_image, to_pixels, to_rgb

RAMP = np.linspace(0, 1, 256 * 4).reshape(4, 256)  # shades from black to white
COLORS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
ALPHA = np.tile(np.arange(0, 256, 17, dtype=np.uint8), (16, 1))


def on_white(colors: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Straight alpha over white, in float64."""
    share = alpha[..., None] / 255
    return colors * share + 255 * (1 - share)


def check(image: Image.Image, expected: NDArray[np.float64], tolerance: float = 1.0) -> None:
    """That a picture is converted to what is expected, (H, W, 3) of 0 to 255."""
    found = np.asarray(to_rgb(image)).astype(float)
    error = np.abs(found - expected).max()
    print(f"{image.mode}: max error {error:.2f} of 255, mean {found.mean():.1f}, expected {expected.mean():.1f}")
    assert found.shape == expected.shape
    assert error <= tolerance


def gray(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.repeat(255 * shares[..., None], 3, axis=-1)


NUMBERS: dict[str, Image.Image] = {
    "I;16": Image.fromarray((RAMP * 65535).round().astype("<u2")),
    "I;16B": Image.frombytes("I;16B", (256, 4), (RAMP * 65535).round().astype(">u2").tobytes()),
    "I of 8 bits": Image.fromarray((RAMP * 255).round().astype(np.int32)),
    "I of 16 bits": Image.fromarray((RAMP * 65535).round().astype(np.int32)),
    "I of 31 bits": Image.fromarray((RAMP * (2**31 - 1)).round().astype(np.int32)),
    "F to 1": Image.fromarray(RAMP.astype(np.float32)),
    "F to 255": Image.fromarray((RAMP * 255).astype(np.float32)),
    "F to 65535": Image.fromarray((RAMP * 65535).astype(np.float32)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_more_than_8_bits_are_scaled_and_not_clipped(name: str) -> None:
    image = NUMBERS[name]
    assert image.mode == name.split()[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(image, gray(RAMP), 0.51 if "8 bits" not in name else 1.0)
    said = [str(warning.message) for warning in caught]
    print(said)
    assert len(said) == (image.mode[:4] != "I;16")  # the others do not say what white is
    assert all("is taken as white" in line for line in said)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.full((2, 2), np.nan, np.float32), "values from nan to nan, expected 0 to 1 or 255 or 65535"),
        (np.full((2, 2), np.inf, np.float32), "values from inf to inf"),
        (np.array([[-0.5, 1]], np.float32), "values from -0.5 to 1"),
        (np.array([[0, 7e4]], np.float32), "values from 0 to 70000"),
        (np.array([[-1, 3]], np.int32), "values from -1 to 3, expected 0 to 255 or 65535 or 2147483647"),
    ],
)
def test_numbers_that_are_no_shades_are_refused(values: NDArray[np.float32], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        to_rgb(Image.fromarray(values))


@cache
def transparent() -> dict[str, tuple[Image.Image, NDArray[np.float64]]]:
    """Pictures with transparency in every way in which Pillow holds it, and what they look like on white."""
    shades, alpha = COLORS[..., 0], Image.fromarray(ALPHA)
    color = Image.fromarray(np.dstack([COLORS, ALPHA]))
    gray = Image.merge("LA", (Image.fromarray(shades), alpha))
    palette = Image.fromarray(COLORS).quantize(16)
    colors, index = np.asarray(palette.convert("RGB")), np.asarray(palette)
    blended = palette.copy()
    blended.putalpha(alpha)
    wide = shades.astype(np.uint16) * 257
    one = (2, 5)

    def marked(image: Image.Image, transparency: object) -> Image.Image:
        image = image.copy()
        image.info["transparency"] = transparency
        return image

    def cut(colors: NDArray[np.uint8], gone: NDArray[np.bool_]) -> NDArray[np.float64]:
        return on_white(colors, np.where(gone, 0, 255).astype(np.uint8))

    triple = np.repeat(shades[..., None], 3, axis=-1)
    return {
        "RGBA": (color, on_white(COLORS, ALPHA)),
        "RGBa": (color.convert("RGBa"), on_white(COLORS, ALPHA)),
        "LA": (gray, on_white(triple, ALPHA)),
        "La": (gray.convert("La"), on_white(triple, ALPHA)),
        "PA": (blended, on_white(colors, ALPHA)),
        "P with one transparent index": (marked(palette, 3), cut(colors, index == 3)),
        "P with an alpha for each index": (
            marked(palette, bytes(range(0, 256, 16))),
            on_white(colors, (index * 16).astype(np.uint8)),
        ),
        "RGB with one transparent color": (
            marked(Image.fromarray(COLORS), tuple(COLORS[one].tolist())),
            cut(COLORS, (COLORS[one] == COLORS).all(-1)),
        ),
        "L with one transparent shade": (
            marked(Image.fromarray(shades), int(shades[one])),
            cut(triple, shades == shades[one]),
        ),
        "I;16 with one transparent shade": (
            marked(Image.fromarray(wide), int(wide[one])),
            cut(triple, shades == shades[one]),
        ),
    }


@pytest.mark.parametrize("name", transparent())
def test_what_is_transparent_lies_on_white(name: str) -> None:
    image, expected = transparent()[name]
    with pytest.warns(UserWarning, match="transparent in places, which are taken as white"):
        check(image, expected, 1.5 if name in ("RGBa", "La") else 1.0)  # premultiplied colors have fewer bits


def test_opaque_alpha_is_no_transparency() -> None:
    image = Image.fromarray(np.dstack([COLORS, np.full_like(ALPHA, 255)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(image, COLORS.astype(float), 0)


def plain(mode: str) -> tuple[Image.Image, NDArray[np.float64], float]:
    """A picture of a mode without transparency, its colors, and by how much its 8 bits may miss them."""
    picture = Image.fromarray(COLORS).resize((64, 64), Image.Resampling.BICUBIC)
    image, colors = picture.convert(mode), np.asarray(picture).astype(float)
    values = np.asarray(image)
    match mode:
        case "1":
            return image, gray(values.astype(float)), 0
        case "L":
            return image, gray((colors @ [0.299, 0.587, 0.114]) / 255), 1
        case "P":
            palette = np.array(image.getpalette(), dtype=float).reshape(-1, 3)
            return image, palette[values], 0
        case _:
            return image, colors, {"YCbCr": 3, "HSV": 6, "LAB": 40}.get(mode, 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_keep_their_colors(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(*plain(mode))


def test_pixels_are_stretched_on_white() -> None:
    hidden = np.dstack([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)])  # black under alpha 0
    with pytest.warns(UserWarning, match="taken as white"):
        pixels = to_pixels(Image.fromarray(hidden), (16, 24))
    assert pixels.shape == (1, 3, 24, 16)
    assert (pixels == 1).all()


def drawing() -> Image.Image:
    """A picture that is neither square nor of a size that is asked for."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((150, 90), Image.Resampling.BICUBIC)


def test_pixels_come_back() -> None:
    image = drawing()
    assert np.array_equal(np.asarray(to_image(to_pixels(image, image.size)[0])), np.asarray(image))


def test_finite_counts_what_is_not() -> None:
    with pytest.raises(ArithmeticError, match=r"the part gave 2 of 3 values"):
        check_finite("the part", torch.tensor([1.0, float("nan"), float("inf")]))
