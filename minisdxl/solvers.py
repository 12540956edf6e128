"""Solvers beside Euler's method: Heun, DPM-Solver++(2M), Euler ancestral, LCM. Symbols as in ``sampler``.

All take ``x`` (B, C, H, W) at noise level ``sigmas[0]`` and descending ``sigmas`` (n + 1,), the last of them 0 for a
finished latent, and yield n latents like x, in its dtype: x after each step, number i at noise level ``sigmas[i + 1]``;
the x passed in is not yielded. Fresh noise for image i comes from ``generators[i]``; the ODE solvers need none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from minisdxl.sampler import Denoiser, check_generators, fresh_noise


@torch.no_grad()
def heun(denoiser: Denoiser, x: Tensor, sigmas: Tensor, generators: Sequence[torch.Generator] = ()) -> Iterator[Tensor]:
    """Heun's method on the probability-flow ODE: EDM algorithm 2 without churn, of second order.

    Calls the denoiser twice in a step, both times with the number of that step, and once in a step to sigma 0.
    """
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        d = (x - denoiser(x, sigma, step)) / sigma
        ahead = x + (sigma_next - sigma) * d
        if sigma_next > 0:
            d = (d + (ahead - denoiser(ahead, sigma_next, step)) / sigma_next) / 2
        x = x + (sigma_next - sigma) * d
        yield x


@torch.no_grad()
def dpmpp_2m(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, generators: Sequence[torch.Generator] = ()
) -> Iterator[Tensor]:
    """DPM-Solver++(2M), multistep and of second order: algorithm 2 of arXiv:2211.01095, in the variable x / alpha.

    With lambda = -log(sigma) and h its step; the first step, and a last one to sigma 0, are of first order.
    """
    previous, h_previous = x, math.inf  # before the first step there is no denoised latent: 1 / r is 0
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoiser(x, sigma, step)
        if sigma_next > 0:
            h = math.log(sigma / sigma_next)
            r = h_previous / h
            extrapolated = denoised + (denoised - previous) / (2 * r)
            x = math.exp(-h) * x - math.expm1(-h) * extrapolated
            previous, h_previous = denoised, h
        else:
            x = denoised
        yield x


@torch.no_grad()
def euler_ancestral(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, generators: Sequence[torch.Generator]
) -> Iterator[Tensor]:
    """Euler's method to below the next noise level, then fresh noise up to it.

    How far below is what DDPM's posterior says (official: ``EulerAncestralSampler`` with eta 1). Raises ``ValueError``,
    once the first latent is asked for, without a generator for each image.
    """
    check_generators(generators, x)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        sigma_down = sigma_next**2 / sigma
        sigma_up = math.sqrt(sigma_next**2 - sigma_down**2)
        d = (x - denoiser(x, sigma, step)) / sigma
        x = x + (sigma_down - sigma) * d
        if sigma_up > 0:
            x = x + sigma_up * fresh_noise(generators, x)
        yield x


@torch.no_grad()
def lcm(denoiser: Denoiser, x: Tensor, sigmas: Tensor, generators: Sequence[torch.Generator]) -> Iterator[Tensor]:
    """Multistep consistency sampling: to the denoised latent at once, then fresh noise up to the next noise level.

    Algorithm 3 of arXiv:2310.04378. Raises ``ValueError``, once the first latent is asked for, without a generator for
    each image.
    """
    # NOTE: LCM's boundary condition, c_skip x / sqrt(1 + sigma^2) + c_out D, is left out. At the timesteps of up to 8
    # steps both c_skip and 1 - c_out are below 1.3e-7, about what fp32 rounds away.
    check_generators(generators, x)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x = denoiser(x, sigma, step)
        if sigma_next > 0:
            x = x + sigma_next * fresh_noise(generators, x)
        yield x
