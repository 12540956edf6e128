"""Lesson 1: Euler's step, guidance, and how small a latent is."""

from __future__ import annotations

import math
from typing import Any

import torch

from checks.verdict import Checker, compare, number, run
from minisdxl.config import SDXL_BASE


def euler_step(answer: Any) -> str | None:
    """``answer(x, denoised, sigma, sigma_next)`` is x after one step of Euler's method."""
    generator = torch.Generator().manual_seed(1)
    x, denoised = torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)
    sigma, sigma_next = 3.7, 1.9
    d = (x - denoised) / sigma
    return compare(
        run(answer, x, denoised, sigma, sigma_next),
        x + (sigma_next - sigma) * d,
        {
            "the step has the wrong sign: noise becomes more. sigma falls, so sigma_next - sigma is negative.": x
            - (sigma_next - sigma) * d,
            "the slope is (x - denoised) / sigma; you left out the division.": x + (sigma_next - sigma) * d * sigma,
            "that is the denoised latent itself. Only a step to sigma 0 ends there.": denoised,
            "you step by sigma_next; the step is sigma_next - sigma.": x + sigma_next * d,
        },
    )


def guidance(answer: Any) -> str | None:
    """``answer(u, c, scale)`` is classifier-free guidance of the unconditional u and the conditional c."""
    generator = torch.Generator().manual_seed(2)
    u, c = torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)
    scale = 4.0
    return compare(
        run(answer, u, c, scale),
        u + scale * (c - u),
        {
            "u and c have changed places: this guides away from the prompt.": c + scale * (u - c),
            "this is guidance of scale + 1: at scale 1 it should be c.": c + scale * (c - u),
            "the difference has the wrong sign.": u - scale * (c - u),
        },
    )


def compression(answer: Any) -> str | None:
    """How many times fewer numbers a latent of SDXL has than the pixels of its picture."""
    vae = SDXL_BASE.vae
    pixels = 3 * vae.downscale**2  # of each position of the latent
    right = pixels / vae.latent_channels
    found = number(answer)
    if math.isclose(found, vae.downscale**2):
        return f"that counts positions. Each has 3 numbers in the picture and {vae.latent_channels} in the latent."
    if math.isclose(found, vae.downscale * 3 / vae.latent_channels):
        return f"both sides of the picture are {vae.downscale} times shorter, not one."
    if math.isclose(found, 1 / right):
        return "that is the other way round: fewer, so more than 1."
    return None if math.isclose(found, right, rel_tol=1e-6) else f"you have {found:g} times; count channels as well."


CHECKERS: dict[str, Checker] = {"1.1": euler_step, "1.2": guidance, "1.3": compression}
