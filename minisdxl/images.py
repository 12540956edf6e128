"""Conversion between tensors and PIL images, and the check for numbers that are not finite."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from minisdxl.vae import VAE


def to_image(picture: Tensor) -> Image.Image:
    """The image of a picture (3, H, W). Values outside [-1, 1] are clipped."""
    pixels = rearrange(picture.float().add(1).mul(127.5).clamp(0, 255).round().byte(), "c h w -> h w c")
    return Image.fromarray(pixels.cpu().numpy())


def to_pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """An image of any size and mode, resized to ``size`` (width, height): (1, 3, H, W) in [-1, 1].

    Warns and raises as :func:`to_rgb`.
    """
    pixels = np.array(to_rgb(image).resize(size, Image.Resampling.LANCZOS))
    return rearrange(torch.from_numpy(pixels).float().div(127.5).sub(1), "h w c -> 1 c h w")


def encode_image(vae: VAE, image: Image.Image | None, size: tuple[int, int]) -> Tensor | None:
    """The latent of an image, resized to ``size`` (width, height); ``None`` for no image.

    Warns and raises as :func:`to_rgb` and :func:`encode_pixels`.
    """
    return None if image is None else encode_pixels(vae, to_pixels(image, size))


def encode_pixels(vae: VAE, pixels: Tensor) -> Tensor:
    """The latents (B, 4, h, w) in fp32 of pixels (B, 3, H, W) in [-1, 1], on the device of the VAE.

    Raises ``ArithmeticError`` if the encoder overflows, ``ValueError`` for a model that was loaded without it.
    """
    if next(vae.encoder.parameters()).is_meta:
        raise ValueError("the model was loaded without its VAE's encoder, expected vae_encoder=True for an image")
    return check_finite("the VAE encoder", vae.encode(pixels.to(vae.quant_conv.weight.device))).float()


# What white may be in Pillow's modes of more than 8 bits. "I" and "F" do not say how their numbers are meant.
WHITES: dict[str, tuple[int, ...]] = {"I;16": (65535,), "I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535)}


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any of Pillow's modes in RGB: on white where it is transparent, and scaled where it has more bits.

    Pillow's own conversion shows the color hidden under alpha 0, and clips numbers above 255. Warns of transparency,
    and of a scale that is guessed. Raises ``ValueError`` for numbers that are no shades of gray.
    """
    if image.mode[:4] in WHITES:  # "I;16" has variants by byte order
        image = _to_gray(image, WHITES[image.mode[:4]])
    if image.mode == "La":  # Pillow converts gray with premultiplied alpha to this mode only
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            warnings.warn("the picture is transparent in places, which are taken as white", stacklevel=2)
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_gray(image: Image.Image, whites: tuple[int, ...]) -> Image.Image:
    """A picture of large numbers, in 8 bits ("L", or "LA" where it has a transparent shade)."""
    values = np.asarray(image).astype(np.float64)
    low, high = (float(end) for end in (values.min(), values.max()))
    white = next((white for white in whites if low >= 0 and high <= white), None)  # None for NaN too
    if white is None:
        expected = " or ".join(map(str, whites))
        raise ValueError(f"the picture has values from {low:g} to {high:g}, expected 0 to {expected}")
    if len(whites) > 1:
        warnings.warn(f"the picture's values go up to {high:g}: {white} is taken as white", stacklevel=3)
    gray = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    if "transparency" in image.info:  # of a PNG: one shade
        opaque = values != image.info["transparency"]
        gray.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
    return gray


def check_finite(part: str, values: Tensor) -> Tensor:
    """Returns ``values``. Raises ``ArithmeticError``, which names ``part``, if one of them is infinite or NaN."""
    bad = values.numel() - int(values.isfinite().sum())
    if bad:
        raise ArithmeticError(
            f"{part} gave {bad} of {values.numel()} values that are not finite numbers in {values.dtype}; "
            "try fp32 or bf16, and weights that are known to be good"
        )
    return values
