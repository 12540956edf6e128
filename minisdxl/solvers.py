"""Solvers beside Euler's method: Heun, DPM-Solver++(2M), Euler ancestral, Euler with churn, LCM.

All take ``x`` (B, C, H, W) at noise level ``sigmas[0]`` and descending ``sigmas`` (n + 1,), the last of them 0 for a
clean latent. They yield n latents in the dtype of x: x after each step, number i at noise level ``sigmas[i + 1]``.
Fresh noise for image i comes from ``generators[i]``; the ODE solvers need none. Symbols are those of ``sampler``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from minisdxl.sampler import Denoiser, draw_noise


@torch.no_grad()
def heun(denoiser: Denoiser, x: Tensor, sigmas: Tensor, generators: Sequence[torch.Generator] = ()) -> Iterator[Tensor]:
    """Heun's method on the probability-flow ODE, of second order: EDM algorithm 1.

    Calls the denoiser twice per step, with the same step number, but once in a step to sigma 0.
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

    lambda is -log(sigma), and h is its step. The first step, and a last one to sigma 0, are of first order.
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
    """Euler's method to a sigma below the next noise level, then fresh noise up to that level.

    The lower sigma follows from DDPM's posterior (official: ``EulerAncestralSampler`` with eta 1). Raises
    ``ValueError`` at the first latent unless there is a generator for each image.
    """
    _check_generators(generators, x)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        sigma_down = sigma_next**2 / sigma
        sigma_up = math.sqrt(sigma_next**2 - sigma_down**2)
        d = (x - denoiser(x, sigma, step)) / sigma
        x = x + (sigma_down - sigma) * d
        if sigma_up > 0:
            x = x + sigma_up * _fresh_noise(generators, x)
        yield x


@torch.no_grad()
def churned_euler(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    generators: Sequence[torch.Generator],
    s_churn: float,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Tensor]:
    """Euler's method with fresh noise before each step: EDM algorithm 2 without its second-order correction.

    ``s_churn`` is the amount of noise, added where s_tmin <= sigma <= s_tmax. Raises ``ValueError`` at the first latent
    if it is negative, or unless there is a generator for each image.
    """
    if not s_churn >= 0:
        raise ValueError(f"s_churn is {s_churn}, expected 0 or more")
    _check_generators(generators, x)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * _fresh_noise(generators, x)
        d = (x - denoiser(x, sigma_hat, step)) / sigma_hat
        x = x + (sigma_next - sigma_hat) * d
        yield x


@torch.no_grad()
def lcm(denoiser: Denoiser, x: Tensor, sigmas: Tensor, generators: Sequence[torch.Generator]) -> Iterator[Tensor]:
    """Multistep consistency sampling: to the denoised latent at once, then fresh noise up to the next noise level.

    Algorithm 3 of arXiv:2310.04378. Raises ``ValueError`` at the first latent unless there is a generator for each
    image.
    """
    # NOTE: LCM's boundary condition, c_skip x / sqrt(1 + sigma^2) + c_out D, is left out. At the timesteps of up to 8
    # steps both c_skip and 1 - c_out are below 1.3e-7, about the rounding of fp32.
    _check_generators(generators, x)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x = denoiser(x, sigma, step)
        if sigma_next > 0:
            x = x + sigma_next * _fresh_noise(generators, x)
        yield x


def _check_generators(generators: Sequence[torch.Generator], x: Tensor) -> None:
    """Raises ``ValueError`` unless there is a generator for each image of ``x``."""
    if len(generators) != len(x):
        raise ValueError(f"fresh noise has {len(generators)} generators for {len(x)} images, expected one for each")


def _fresh_noise(generators: Sequence[torch.Generator], x: Tensor) -> Tensor:
    """Standard normal noise like ``x`` (B, C, H, W), image i from generator i."""
    return draw_noise(generators, x.shape[1:]).to(x)
