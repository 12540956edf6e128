"""Diffusion sampling: noise levels, denoising, guidance and Euler's method, in the symbols of the EDM paper.

EDM is Karras et al. 2022, arXiv:2206.00364. ``x`` is a latent (B, C, H, W) with noise of standard deviation ``sigma``,
always in fp32, and ``D(x; sigma)`` is the denoised latent. All images of a batch have the same sigma. Sigmas are
computed in float64 and used as Python floats. Other solvers are in ``solvers``; ``samplings`` combines them by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from atedm.plan import TokenPlan
from minisdxl.config import NoiseConfig
from minisdxl.preconditioning import Preconditioner, discrete_sigmas, preconditioner
from minisdxl.seeds import generator

Denoiser = Callable[[Tensor, float, int], Tensor]  # (x, sigma, step) -> D(x; sigma)
Solver = Callable[[Denoiser, Tensor, Tensor, Sequence[torch.Generator]], Iterator[Tensor]]
Spacing = Callable[[int, NoiseConfig], Tensor]  # n steps to n indices into the levels of training, descending, int64


def timesteps(n: int, noise: NoiseConfig) -> Tensor:
    """Official spacing: linspace(steps - 1, 0, n, endpoint=False), truncated, as in ``LegacyDDPMDiscretization``.

    Raises ``ValueError`` for n outside 1..steps.
    """
    check_steps(n, noise.steps)
    last = noise.steps - 1
    # float64, not integers: of n = 99, number 77 is 221.99..., not 222, and the official code truncates that to 221.
    return (torch.arange(n, dtype=torch.float64) * (-last / n) + last).long()


def check_steps(n: int, most: int) -> None:
    """Raises ``ValueError`` unless 1 <= n <= most."""
    if not 1 <= n <= most:
        raise ValueError(f"number of sampling steps is {n}, expected 1 to {most}")


def sigmas(n: int, noise: NoiseConfig, spacing: Spacing = timesteps) -> Tensor:
    """Noise levels of ``n`` steps, descending, and a final 0: (n + 1,) float64. Raises as ``spacing`` does."""
    return torch.cat([discrete_sigmas(noise)[spacing(n, noise)], torch.zeros(1, dtype=torch.float64)])


def image_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each image. Raises ``ValueError`` as :func:`minisdxl.seeds.check_seed`."""
    return [generator(seed) for seed in seeds]


def draw_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape), fp32 on the CPU. Image i uses generator i, so batches do not change it."""
    return torch.stack([torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators])


def initial_noise(generators: Sequence[torch.Generator], shape: Sequence[int], sigma_0: float) -> Tensor:
    """The first x (B, C, H, W), at noise level ``sigma_0``. Official scale: unit data variance plus noise."""
    return math.sqrt(1 + sigma_0**2) * draw_noise(generators, shape)


def denoise(
    network: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: float, preconditioning: Preconditioner
) -> Tensor:
    """D(x; sigma) of a ``network(c_in x, c_noise (B,))``: EDM equation 7."""
    c_skip, c_out, c_in, c_noise = preconditioning(sigma)
    return c_skip * x + c_out * network(c_in * x, torch.full((len(x),), c_noise, device=x.device))


KV = TypeVar("KV")


class NoisePredictor(Protocol[KV]):
    """What the sampler needs of a U-Net."""

    def project_context(self, context: Tensor) -> KV:
        """Keys and values of a context (B, 77, channels), the same at every noise level."""

    def __call__(self, x: Tensor, c_noise: Tensor, text: KV, vector: Tensor, plan: TokenPlan) -> Tensor:
        """The noise in ``x``, c_in times the latent (B, C, H, W), or another of ``preconditioning``'s predictions."""


@dataclass(frozen=True)
class UNetInputs:
    """What the U-Net is conditioned on, in its dtype: context (B, 77, channels) and vector (B, channels)."""

    context: Tensor
    vector: Tensor


def guided_denoiser(
    unet: NoisePredictor[KV],
    conditional: UNetInputs,
    unconditional: UNetInputs,
    scale: float,
    plans: Callable[[int], TokenPlan],
    noise: NoiseConfig,
) -> Denoiser:
    """D(x; sigma) with classifier-free guidance, u + scale (c - u). ``plans(step)`` is the token plan of a step.

    The U-Net runs once on a batch of 2B, unconditional half first; at ``scale`` 1 on the conditional B alone. It runs
    in its own dtype, everything around it in fp32. Keys and values of the context are computed once, here.
    """
    halves = [conditional] if scale == 1 else [unconditional, conditional]
    context = torch.cat([half.context for half in halves])
    vector = torch.cat([half.vector for half in halves])
    text = unet.project_context(context)
    preconditioning = preconditioner(noise)

    def denoiser(x: Tensor, sigma: float, step: int) -> Tensor:
        def network(scaled: Tensor, c_noise: Tensor) -> Tensor:
            return unet(scaled.to(context.dtype), c_noise, text, vector, plans(step)).float()

        denoised = denoise(network, torch.cat([x] * len(halves)), sigma, preconditioning)
        if scale == 1:
            return denoised
        u, c = denoised.chunk(2)
        return u + scale * (c - u)

    return denoiser


@torch.no_grad()
def euler(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, generators: Sequence[torch.Generator] = ()
) -> Iterator[Tensor]:
    """Euler's method on the probability-flow ODE: EDM algorithm 1 without its second-order correction.

    Takes x at noise level ``sigmas[0]``. Yields x after each step, the last one at sigma 0.
    """
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        d = (x - denoiser(x, sigma, step)) / sigma  # dx/dsigma
        x = x + (sigma_next - sigma) * d
        yield x
