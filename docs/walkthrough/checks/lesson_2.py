"""Lesson 2: official names, layers and tokens of SDXL's U-Net."""

from __future__ import annotations

from typing import Any

import torch

from checks.verdict import Checker, number, run
from minisdxl.config import SDXL_BASE
from minisdxl.transformer import AttentionBlock
from minisdxl.unet import UNet

BLOCK = "up.1.1"


def official_name(answer: Any) -> str | None:
    """The official name of the attention block ``BLOCK``, read from the U-Net itself."""
    with torch.device("meta"):
        unet = UNet(SDXL_BASE.unet)
    names = {name: module.name for name, module in unet.named_modules() if isinstance(module, AttentionBlock)}
    if not isinstance(answer, str):
        return f"this is {answer!r}, expected a name in quotes."
    given = answer.removeprefix("model.diffusion_model.")
    if given in names:
        return None if names[given] == BLOCK else f"{given} is {names[given]}."
    if any(name.startswith(f"{given}.") for name in names):
        return f"{given} is the numbered block; the attention in it is its second part, with a number of its own."
    parts = dict(unet.named_modules())
    return f"{given} is {type(parts[given]).__name__}, not attention." if given in parts else f"there is no {given}."


def layers(answer: Any) -> str | None:
    """The transformer layers of SDXL's U-Net in all."""
    sites = list(SDXL_BASE.unet.attention_sites())
    found, right = number(answer), sum(site.depth for site in sites)
    if found == len(sites):
        return f"{found:g} is the number of attention blocks; each has several layers."
    if found == right - SDXL_BASE.unet.middle_depth:
        return "you left out the middle block."
    if found == sum(site.depth for site in sites if site.stage != "up"):
        return "you left out the way up."
    return None if found == right else f"it is not {found:g}: add up the layers of the {len(sites)} blocks."


def token_count(answer: Any) -> str | None:
    """``answer(level, width, height)``, for sizes that halve evenly and for one that does not."""
    f = SDXL_BASE.vae.downscale
    for level, width, height in ((1, 1024, 1024), (2, 1024, 1024), (1, 1152, 896), (2, 1000, 1016)):
        rows, columns = (-(-(side // f) >> level) for side in (height, width))
        found = number(run(answer, level, width, height))
        said = f"for level {level} of {width}x{height} px you have {found:g}"
        if found == (width >> level) * (height >> level):
            return f"{said}: these are positions of the picture. The latent is {f} times shorter on both sides."
        if found == (width // f) * (height // f):
            return f"{said}: these are the positions at level 0. Each level halves both sides."
        if found == (width // f) * (height // f) / 2**level:
            return f"{said}: a level halves both sides, so it has a quarter of the positions."
        if found == (width // f >> level) * (height // f >> level) != rows * columns:
            return f"{said}: halves are rounded up, to {rows} x {columns}."
        if found != rows * columns:
            return f"{said}, expected {rows} x {columns}."
    return None


CHECKERS: dict[str, Checker] = {"2.1": official_name, "2.2": layers, "2.3": token_count}
