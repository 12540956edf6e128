"""Tensors to images and back, and the check that tensors hold finite numbers."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor


def to_image(picture: Tensor) -> Image.Image:
    """A picture (3, H, W) in [-1, 1], beyond which it is clipped."""
    pixels = rearrange(picture.float().add(1).mul(127.5).clamp(0, 255).round().byte(), "c h w -> h w c")
    return Image.fromarray(pixels.cpu().numpy())


def to_pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """An image of any size and mode, stretched to ``size`` (width, height): (1, 3, H, W) in [-1, 1]."""
    pixels = np.array(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    return rearrange(torch.from_numpy(pixels).float().div(127.5).sub(1), "h w c -> 1 c h w")


def check_finite(part: str, values: Tensor) -> Tensor:
    """``values``, unless one is infinite or no number: then ``ArithmeticError`` names the part that gave them."""
    bad = values.numel() - int(values.isfinite().sum())
    if bad:
        raise ArithmeticError(
            f"{part} gave {bad} of {values.numel()} values that are not finite numbers in {values.dtype}; "
            "try fp32 or bf16, and weights that are known to be good"
        )
    return values
