"""From noise to latent, as functions in the symbols of the EDM paper (Karras et al. 2022, arXiv:2206.00364).

``x`` is a latent (B, C, H, W) with noise of standard deviation ``sigma`` on it, always fp32; ``D(x; sigma)`` is the
denoised latent. Every image of a batch is at the same sigma. Sigmas are computed in float64 and act as Python floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minisdxl.config import NoiseConfig

if TYPE_CHECKING:
    from atedm.plan import TokenPlan

Denoiser = Callable[[Tensor, float, int], Tensor]  # (x, sigma, step) -> D(x; sigma)
UNetCall = Callable[[Tensor, Tensor, Tensor, Tensor, "TokenPlan"], Tensor]  # (c_in x, c_noise, context, vector, plan)


def discrete_sigmas(noise: NoiseConfig) -> Tensor:
    """Noise levels of training, ascending: (steps,) float64. Official: ``LegacyDDPMDiscretization``."""
    betas = torch.linspace(noise.beta_start**0.5, noise.beta_end**0.5, noise.steps, dtype=torch.float64) ** 2
    alphas_bar = torch.cumprod(1 - betas, dim=0)
    return ((1 - alphas_bar) / alphas_bar).sqrt()


def timesteps(n: int, noise: NoiseConfig) -> Tensor:
    """Indices into :func:`discrete_sigmas` at which ``n`` steps sample, descending from the last: (n,) int64.

    The official linspace(steps - 1, 0, n, endpoint=False), truncated. NOTE: "trailing" in diffusers rounds: the same
    where n divides 1000, off by one in places for nearly all other n. Raises ``ValueError`` for n outside 1..steps.
    """
    if not 1 <= n <= noise.steps:
        raise ValueError(f"number of sampling steps is {n}, expected 1 to {noise.steps}")
    last = noise.steps - 1
    # float64, not integers: of n = 99, number 77 is 221.99..., not 222, and the official code truncates that to 221.
    return (torch.arange(n, dtype=torch.float64) * (-last / n) + last).long()


def sigmas(n: int, noise: NoiseConfig) -> Tensor:
    """Noise levels of ``n`` steps, descending, and a final 0: (n + 1,) float64. Raises as :func:`timesteps`."""
    return torch.cat([discrete_sigmas(noise)[timesteps(n, noise)], torch.zeros(1, dtype=torch.float64)])


def image_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each image. Raises ``ValueError`` for a seed outside 0..2**32 - 1."""
    for seed in seeds:
        if not 0 <= seed < 2**32:  # torch's CPU generator drops higher bits: 2**32 would give the picture of seed 0
            raise ValueError(f"seed is {seed}, expected 0 to {2**32 - 1}")
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape), fp32 on the CPU, image i from generator i, so the same in every batch."""
    return torch.stack([torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators])


def initial_noise(generators: Sequence[torch.Generator], shape: Sequence[int], sigma_0: float) -> Tensor:
    """The first x (B, C, H, W), at noise level ``sigma_0``, scaled to unit data variance plus noise, as is official."""
    return math.sqrt(1 + sigma_0**2) * draw_noise(generators, shape)


def denoise(network: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: float, levels: Tensor) -> Tensor:
    """D(x; sigma) of a ``network(c_in x, c_noise (B,))`` that predicts noise, trained at ``levels``: EDM equation 7."""
    # NOTE: the official code rounds sigma itself to the nearest level, so in c_in and c_out too. That is the same
    # without churn; with it, sigma may lie between levels or above the last, and c_in must fit the noise that is there.
    c_skip = 1.0
    c_out = -sigma
    c_in = 1 / math.sqrt(sigma**2 + 1)
    c_noise = int((levels - sigma).abs().argmin())
    return c_skip * x + c_out * network(c_in * x, torch.full((len(x),), c_noise, device=x.device))


@dataclass(frozen=True)
class Condition:
    """What the U-Net is told: context (B, 77, channels) and vector (B, channels), in the U-Net's dtype and device."""

    context: Tensor
    vector: Tensor


def guided_denoiser(
    unet: UNetCall,
    conditional: Condition,
    unconditional: Condition,
    scale: float,
    plans: Callable[[int], TokenPlan],
    noise: NoiseConfig,
) -> Denoiser:
    """D(x; sigma) under classifier-free guidance, u + scale (c - u); ``plans(step)`` is the plan of step 0, 1, ...

    Calls the U-Net once a step with a batch of 2B, the unconditional half first; at ``scale`` 1 with the conditional B
    alone. The U-Net computes in the dtype of the context, everything around it in fp32.
    """
    parts = [conditional] if scale == 1 else [unconditional, conditional]
    context = torch.cat([part.context for part in parts])
    vector = torch.cat([part.vector for part in parts])
    levels = discrete_sigmas(noise)

    def denoiser(x: Tensor, sigma: float, step: int) -> Tensor:
        def network(scaled: Tensor, c_noise: Tensor) -> Tensor:
            return unet(scaled.to(context.dtype), c_noise, context, vector, plans(step)).float()

        denoised = denoise(network, torch.cat([x] * len(parts)), sigma, levels)
        if scale == 1:
            return denoised
        u, c = denoised.chunk(2)
        return u + scale * (c - u)

    return denoiser


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    generators: Sequence[torch.Generator] = (),
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Tensor]:
    """Euler's method on the probability-flow ODE: EDM algorithm 2 without its second-order correction.

    ``x`` (B, C, H, W) is at noise level ``sigmas[0]``, ``sigmas`` (n + 1,) descend. Yields n latents like x, in fp32:
    x after each step, number i at noise level ``sigmas[i + 1]``, the last one finished; the x passed in is not yielded.
    ``s_churn`` above 0 adds fresh noise where s_tmin <= sigma <= s_tmax, to image i from ``generators[i]``.
    Raises ``ValueError``, once the first latent is asked for, if churn is negative or lacks a generator for each image.
    """
    if not s_churn >= 0:
        raise ValueError(f"s_churn is {s_churn}, expected 0 or more")
    if s_churn > 0 and len(generators) != len(x):
        raise ValueError(f"churn has {len(generators)} generators for {len(x)} images, expected one for each image")
    x = x.float()
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * draw_noise(generators, x.shape[1:]).to(x.device)
        d = (x - denoiser(x, sigma_hat, step)) / sigma_hat  # dx/dsigma
        x = x + (sigma_next - sigma_hat) * d
        yield x
